"""What a layer of a capture computed: from the file that was stored of it, or by a forward pass over its tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.errors import StorageError
from tlcapture.storage.files import read_tensors
from tlcapture.storage.tensors import is_plain
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import hook
from tlcapture.views.internals import internals_hooks, internals_view

if TYPE_CHECKING:
    from tlcapture.explore.applied_interventions import AppliedInterventions
    from tlcapture.explore.attention_heads import AttentionHeads
    from tlcapture.models.loading import Model


def stored_internals(path: Path, capture: Capture, layer: int) -> dict[str, Tensor] | None:
    """The internals in a file, by TransformerLens's names; `None` if it is of other tokens.

    Raises `StorageError` for a damaged file.
    """
    value = read_tensors(path)
    if not isinstance(value, dict) or value.get("token_ids") != capture.token_ids:
        return None
    found = {name: each for name, each in value.items() if name.startswith(f"blocks.{layer}.")}
    if not found or not all(map(is_plain, found.values())):
        raise StorageError(f"{path}: not a valid internals file: it holds no activations of layer {layer}")
    return found


def computed_internals(
    capture: Capture, layer: int, model: Model, run: Callable[[Sequence[str]], Cache]
) -> dict[str, Tensor]:
    """The internals of a layer, of those tokens that the capture holds; `run` gives activations of a pass over all."""
    cache = run(internals_hooks(layer, model.hook_names))
    return internals_view(cache, layer, None if capture.positions.is_all else capture.positions)


def run_again(capture: Capture, model: Model, applied: AppliedInterventions, names: Sequence[str]) -> Cache:
    """Activations of a pass over the tokens of a capture, under the interventions that it was made with."""
    from tlcapture.commands.replay import as_prompt
    from tlcapture.generation.loop import generate
    from tlcapture.generation.outcomes import Failure

    prompt = as_prompt(capture, capture.prompt_id)
    how: dict[str, Any] = {"interventions": applied.changes(), "own_hooks": applied.hooks}
    outcome = next(generate(model, [prompt], hooks=names, **how))
    if isinstance(outcome, Failure):
        raise outcome.error(f"{capture.capture_set}/{capture.prompt_id}: {outcome.reason}")
    return outcome.cache


def stored_hooks(
    n_layers: int,
    internals_of: Callable[[int], dict[str, Tensor] | None],
    heads_of: Callable[[int], AttentionHeads | None],
) -> Callable[[str], Tensor | None]:
    """A function that finds an activation, by TransformerLens's name and in float32, in the files of a layer.

    Patterns `[n_heads, query, key]` have rows for the tokens that the capture holds. It returns `None` for what no file
    holds.
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
