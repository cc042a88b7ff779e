"""The error for a prompt set without captures. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from tlcapture.errors import InputError
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import beside


def no_captures(layout: Layout, prompt_set: str, captured: Sequence[str], remedy: str = "") -> InputError:
    """The error that lists the `captured` sets, variants included, and suggests the one that was probably meant."""
    others = beside(prompt_set, captured, "captured sets")
    return InputError(
        f"experiment {layout.experiment!r} has no captures of prompt set {prompt_set!r}{others}"
        f"{f'; {remedy}' if remedy else ''}"
    )
