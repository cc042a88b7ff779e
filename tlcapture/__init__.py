"""Watch a language model think while it writes: capture activations token by token, project them onto traits.

    from tlcapture import Experiment, capture, load_model

Importing this package loads no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tlcapture.captures import Capture
    from tlcapture.errors import TlcaptureError
    from tlcapture.experiment import Experiment
    from tlcapture.live import capture
    from tlcapture.models import load_model
    from tlcapture.prompts import Prompt, PromptSet

_HOMES = {
    "Capture": "tlcapture.captures",
    "Experiment": "tlcapture.experiment",
    "Prompt": "tlcapture.prompts",
    "PromptSet": "tlcapture.prompts",
    "TlcaptureError": "tlcapture.errors",
    "capture": "tlcapture.live",
    "load_ipython_extension": "tlcapture.magics",  # what %load_ext tlcapture looks for
    "load_model": "tlcapture.models",
}

__all__ = ["Capture", "Experiment", "Prompt", "PromptSet", "TlcaptureError", "capture", "load_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tlcapture' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
