"""The activations that a layer computed in a capture, from files of its experiment."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.storage.files import read_tensors
from tlcapture.storage.tensors import is_plain
from tlcapture.storage.validation import of_form
from tlcapture.views.hooks import hook

if TYPE_CHECKING:
    from tlcapture.explore.figures.attention_heads import AttentionHeads


def stored_internals(path: Path, capture: Capture, layer: int) -> dict[str, Tensor] | None:
    """The internals in a file, by TransformerLens's names; `None` if the file has other tokens.

    Raises `StorageError` for a damaged file.
    """
    value = read_tensors(path)
    with of_form(path, "internals file"):
        if not isinstance(value, dict) or value.get("token_ids") != capture.token_ids:
            return None
        found = {name: each for name, each in value.items() if name.startswith(f"blocks.{layer}.")}
        if not found or not all(map(is_plain, found.values())):
            raise ValueError(f"it holds no activations of layer {layer}")
    return found


def stored_hooks(
    n_layers: int,
    internals_of: Callable[[int], dict[str, Tensor] | None],
    heads_of: Callable[[int], AttentionHeads | None],
) -> Callable[[str], Tensor | None]:
    """A function that finds an activation, by TransformerLens's name and in float32, in the files of a layer.

    Patterns `[n_heads, query, key]` have rows for the tokens that the capture holds. It returns `None` for
    activations that no file holds.
    """

    def stored(name: str) -> Tensor | None:
        found = re.fullmatch(r"blocks\.(\d{1,4})\..+", name)
        if found is None or int(found[1]) >= n_layers:
            return None
        layer = int(found[1])
        internals = internals_of(layer) or {}
        if name in internals:
            return internals[name].float()
        heads = heads_of(layer) if name == hook("pattern", layer) else None
        return None if heads is None else torch.from_numpy(heads.patterns[:, heads.positions])

    return stored
