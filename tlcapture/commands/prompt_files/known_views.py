"""The facts that decide whether attention, logit lens or internals are finished. An index of files keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcapture.errors import StorageError
from tlcapture.runs.existing_files import check_readable
from tlcapture.storage.experiments.file_index import Facts, as_facts
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, read_tensors
from tlcapture.views.json_files import LensHead, head_of
from tlcapture.views.kept_tokens import KeptTokens, Positions


@dataclass(frozen=True)
class KnownView:
    """The facts about a file of attention, logit lens or internals.

    Attributes:
        layers: layers of attention or lens that are held.
        n_layers: layers of the model; 0 for internals, which belong to one layer.
        top_k: predictions of the lens that are held; 0 for other files.
        positions: the tokens that the file holds.
    """

    layers: Sequence[int]
    n_layers: int
    top_k: int
    positions: Positions

    def lacks(self, tokens: KeptTokens | None, captured: Positions | None) -> bool:
        """Whether the file lacks a token that is wanted: without a choice, one of those that were captured.

        `captured` is `None` where there is no capture, beside which what an existing file holds is enough.
        """
        held = self.positions
        wanted = captured if tokens is None else tokens.of(held.n_prompt, held.n_tokens)
        return wanted is not None and not held.is_all and not held.includes(wanted)


@dataclass(frozen=True)
class PresentFile:
    """An existing file of an add-on; `view` is `None` where it cannot be read."""

    path: Path
    mtime_ns: int
    view: KnownView | None


def with_facts(layout: Layout, written: Written) -> Written:
    """A file of an add-on that was written, with its facts for the index."""
    try:
        return written.knowing(facts_of_view(layout, written.path))
    except StorageError:  # it was replaced meanwhile
        return written


def facts_of_view(layout: Layout, path: Path) -> Facts | None:
    """The facts about a file of attention, logit lens or internals, as an index holds them.

    Raises `StorageError` for a file that cannot be read.
    """
    check_readable(layout, path)
    if path.parent.is_relative_to(layout.folder / "analysis"):
        head = head_of(path)
        held, top_k = head.positions_held, head.top_k if isinstance(head, LensHead) else 0
        return _facts_of_view(head.kept_layers, head.n_layers, top_k, held)
    content = read_tensors(path, whole=False)
    try:
        n_prompt, n_tokens = int(content["n_prompt_tokens"]), len(content["tokens"])
        return _facts_of_view([], 0, 0, Positions.of(content.get("positions"), n_prompt, n_tokens))
    except (KeyError, TypeError, ValueError):  # it states no tokens that it lacks
        return _facts_of_view([], 0, 0, Positions.of(None, 0, 0))


def _facts_of_view(layers: Sequence[int], n_layers: int, top_k: int, held: Positions) -> Facts | None:
    kept = None if held.is_all else list(held.kept)
    return as_facts([list(layers), n_layers, top_k], [kept, held.n_prompt, held.n_tokens])


def known_view(shared: Sequence[Any], own: Sequence[Any]) -> KnownView:
    """The inverse of `facts_of_view`; raises `TypeError` or `ValueError` for other facts."""
    layers, n_layers, top_k = shared
    return KnownView(layers, n_layers, top_k, Positions.of(*own))
