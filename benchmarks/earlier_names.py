"""Names that modules had in earlier checkouts, so that a benchmark can measure those by the names of today."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

_EARLIER = {
    "tlcapture.generation.sampling.next_token": "tlcapture.generation.sampling",
    "tlcapture.models.checkpoints.embedded": "tlcapture.models.embedded",
    "tlcapture.storage.experiments.datasets": "tlcapture.storage.datasets",
    "tlcapture.storage.experiments.layout": "tlcapture.storage.layout",
    "tlcapture.traits.statistics.reference": "tlcapture.traits.reference",
}


def accept_earlier_names() -> None:
    """Let modules be imported by the names of today from whichever checkout `sys.path` finds first."""
    for name, earlier in _EARLIER.items():
        if not _exists(name) and _exists(earlier):
            sys.modules[name] = import_module(earlier)


def _exists(name: str) -> bool:
    with suppress(ModuleNotFoundError):  # of a package that would hold it
        return find_spec(name) is not None
    return False
