"""Projections as tidy frames: one row a prompt, token, trait and layer.

| column | meaning |
| --- | --- |
| `prompt_id` | as in the prompt set, a text |
| `token_idx` | counts over prompt and response in one line |
| `token` | its text |
| `part` | `prompt` or `response` |
| `trait` | `category/name` |
| `layer` | the layer whose activation was projected |
| `score` | the projection `h . v / ||v||`, `h` being `residual_out` (or `attn_out`) of that layer |

A trait has one vector, that of its own layer: rows of other layers project their activations onto it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from tlcapture.errors import InputError
from tlcapture.traits.token_scores import TokenScores

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("prompt_id", "token_idx", "token", "part", "trait", "layer", "score")

Layers = str | SupportsIndex | Iterable[SupportsIndex]


def frame(lines: Sequence[TokenScores], layers: Layers = "own") -> DataFrame:
    """A tidy frame of projections: in their order, by layer, by token.

    Args:
        layers: `own`, each vector's own layer; `all` that were kept; a layer; or several.

    Raises `InputError` for a layer that a projection has not.
    """
    import pandas

    pieces: list[dict[str, Any]] = []
    for line in lines:
        parts = np.where(np.arange(len(line.tokens)) < line.n_prompt_tokens, "prompt", "response")
        for layer in _chosen(line, layers):
            pieces.append(
                {
                    "prompt_id": [line.prompt_id] * len(line.tokens),
                    "token_idx": range(len(line.tokens)),
                    "token": list(line.tokens),
                    "part": parts.tolist(),
                    "trait": [line.trait] * len(line.tokens),
                    "layer": [layer] * len(line.tokens),
                    "score": line.at(layer).tolist(),
                }
            )
    columns = {name: [value for piece in pieces for value in piece[name]] for name in COLUMNS}
    kinds = {"token_idx": "int64", "layer": "int64", "score": "float64"}
    return pandas.DataFrame(columns).astype(kinds)


def _chosen(line: TokenScores, layers: Layers) -> list[int]:
    if isinstance(layers, str):
        if layers == "own":
            return [line.layer]
        if layers == "all":
            return list(line.layers)
        raise InputError(f"layers {layers!r}: expected 'own', 'all', a layer or several")
    chosen = layers if isinstance(layers, Iterable) else [layers]
    return [index(layer) for layer in chosen]
