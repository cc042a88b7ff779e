"""Attention patterns: the weights with which each token attends to earlier ones, by layer and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.names import PromptId
from tlcapture.shapes import Patterns
from tlcapture.storage.rounding import WEIGHT_DIGITS, rounded_for_json
from tlcapture.text import as_ranges
from tlcapture.views.cache import Cache, stacked
from tlcapture.views.hooks import attention_layers, hook
from tlcapture.views.kept_tokens import Positions

_CHUNK = 256  # queries whose weights are gathered at one time


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns:
    """Weights `[len(layers), n_heads, query, key]` of the layers with attention, over keys up to each query.

    Each row sums to 1, or to less if a model has attention sinks that take a share (gpt-oss). The queries are
    the tokens in `positions`; `None` means all. `kept` are the requested layers, if not all were.
    """

    patterns: Patterns
    n_layers: int
    layers: tuple[int, ...]
    positions: Positions | None = None
    kept: tuple[int, ...] | None = None

    def only(self, positions: Positions) -> AttentionPatterns:
        """A copy with the weights of some of the queries; the object itself if these are all."""
        if positions.is_all:
            return self
        return replace(self, patterns=self.patterns[:, :, list(positions.kept)], positions=positions)

    def __repr__(self) -> str:
        _, n_heads, _, n_tokens = self.patterns.shape
        without = "" if len(self.layers) == self.n_layers else f", attention in {as_ranges(self.layers)}"
        return f"AttentionPatterns({self.n_layers} layers{without}, {n_heads} heads, {n_tokens} tokens)"

    def to_json(self, **labels: Any) -> dict[str, Any]:
        """The content of `{id}_attention.json`; `labels` are the keyword arguments of `attention_head`.

        Weights have 4 significant digits; a layer without attention is null. There is an entry for
        each query, with weights of all tokens up to it; `positions` names the queries if these are not all.
        """
        queries = range(self.patterns.shape[-1]) if self.positions is None else self.positions.kept
        return {
            **attention_head(self.n_layers, self.patterns.shape[1], self.positions, self.kept, **labels),
            "attention": [
                {"token_idx": token, "context_size": token + 1, "by_layer": self._by_layer(row, token)}
                for row, token in enumerate(queries)
            ],
        }

    def _by_layer(self, row: int, token: int) -> Any:
        """One token's weights `[n_layers][n_heads][token + 1]`, rounded; null for layers without attention."""
        rows = rounded_for_json(self.patterns[:, :, row, : token + 1].float().numpy(), WEIGHT_DIGITS)
        if len(self.layers) == self.n_layers:
            return rows
        found = dict(zip(self.layers, rows, strict=True))
        return [found.get(layer) for layer in range(self.n_layers)]


def attention_head(
    n_layers: int,
    n_heads: int,
    positions: Positions | None,
    kept: Sequence[int] | None,
    *,
    prompt_id: PromptId,
    prompt_set: str,
    tokens: Sequence[str],
    n_prompt_tokens: int,
    sample: int | None = None,
) -> dict[str, Any]:
    """The content of an attention file without its weights, for all layers and queries or for the named ones."""
    return {
        **({} if kept is None else {"layers": list(kept)}),
        **({} if positions is None else positions.record()),
        "prompt_id": prompt_id,
        **({} if sample is None else {"sample": sample}),
        "prompt_set": prompt_set,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "tokens": list(tokens),
        "n_prompt_tokens": n_prompt_tokens,
        "n_response_tokens": len(tokens) - n_prompt_tokens,
    }


def triangle(cache: Cache, name: str) -> Iterator[NDArray[np.float32]]:
    """A pattern's weights `[n_weights, n_heads]` in chunks of queries: for each query, those of the keys up to it.

    A cache may offer this form itself, as `cache.triangle(name)`.
    """
    own = getattr(cache, "triangle", None)
    chunks = None if own is None else own(name)
    if chunks is not None:
        for chunk in chunks:
            yield chunk.float().numpy()
        return
    pattern = cache[name]
    n_tokens = pattern.shape[-1]
    for first in range(0, n_tokens, _CHUNK):
        stop = min(first + _CHUNK, n_tokens)
        yield lower_triangle(pattern, first, stop).float().cpu().numpy()


def lower_triangle(pattern: Tensor, first: int, stop: int) -> Tensor:
    """The weights `[n_weights, n_heads]` of some queries of a pattern `[head, query, key]`, on the keys up to each."""
    query, key = torch.tril_indices(stop - first, stop, offset=first)
    block = pattern[:, first:stop, :stop].flatten(1)
    return block.index_select(1, (query * stop + key).to(block.device)).T


def attention_hooks(n_layers: int, hook_names: Set[str], only: Sequence[int] = ()) -> list[str]:
    """The activations the view reads: of all layers, or `only` of some.

    Raises `InputError` for a model without attention, and if none of the layers has any.
    """
    layers = attention_layers(n_layers, hook_names)
    if not layers:
        raise InputError("the model has no attention, so there are no attention patterns: leave out --attention")
    wanted = [layer for layer in layers if not only or layer in only]
    if not wanted:
        raise InputError(f"--attention-layers: none of them has attention: layers {as_ranges(layers)} have")
    return [hook("pattern", layer) for layer in wanted]


def attention_view(cache: Cache, n_layers: int, only: Sequence[int] = ()) -> AttentionPatterns:
    """The patterns in a cache, of all layers with attention or `only` of some."""
    layers = tuple(layer for layer in attention_layers(n_layers, cache.keys()) if not only or layer in only)
    kept = tuple(only) or None
    return AttentionPatterns(stacked([cache[hook("pattern", layer)] for layer in layers]), n_layers, layers, kept=kept)
