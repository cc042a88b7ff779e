"""Watch a language model think while it writes: capture activations token by token, project them onto traits.

    from tlcapture import Experiment, capture, load_model

Importing this package loads no torch; the names load what they need on first use. docs/python.md lists the public API.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from tlcapture.version import __version__ as __version__

if TYPE_CHECKING:
    from tlcapture.captures.capture import Capture
    from tlcapture.errors import TlcaptureError
    from tlcapture.explore.experiment import Experiment
    from tlcapture.explore.live.live_capture import capture
    from tlcapture.generation.sampling.next_token import Sampling
    from tlcapture.models.loading import load_model
    from tlcapture.prompts.prompt_sets import Prompt, PromptSet
    from tlcapture.traits.interventions.requested import Ablate, Cap, Steer

_HOMES = {
    "Ablate": "tlcapture.traits.interventions.requested",
    "Cap": "tlcapture.traits.interventions.requested",
    "Capture": "tlcapture.captures.capture",
    "Experiment": "tlcapture.explore.experiment",
    "Prompt": "tlcapture.prompts.prompt_sets",
    "PromptSet": "tlcapture.prompts.prompt_sets",
    "Sampling": "tlcapture.generation.sampling.next_token",
    "Steer": "tlcapture.traits.interventions.requested",
    "TlcaptureError": "tlcapture.errors",
    "capture": "tlcapture.explore.live.live_capture",
    "load_ipython_extension": "tlcapture.explore.notebook.magics",  # called by %load_ext tlcapture
    "load_model": "tlcapture.models.loading",
}

__all__ = [
    "Ablate",
    "Cap",
    "Capture",
    "Experiment",
    "Prompt",
    "PromptSet",
    "Sampling",
    "Steer",
    "TlcaptureError",
    "capture",
    "load_model",
]


logging.getLogger(__name__).addHandler(logging.NullHandler())  # whoever imports the package decides what is shown


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tlcapture' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
