"""Projections as tidy data frames: one row per prompt, token, trait and layer.

| column | meaning |
| --- | --- |
| `prompt_id` | as in the prompt set, a text or a number |
| `sample` | the number of the response, from 1, with `--samples`; missing for a prompt with one response |
| `token_idx` | index over prompt and response as one sequence |
| `token` | its text |
| `part` | `prompt` or `response` |
| `span` | `turn`, `thinking`, `answer`, or `template` for the chat template's own text; null where unknown |
| `role` | whose turn it is: `system`, `user`, `assistant` or `tool`; null for template tokens |
| `trait` | `category/name` |
| `layer` | the layer whose activation was projected |
| `score` | the projection `h . v / ||v||`, `h` being `residual_out` (or `attn_out`) of that layer |
| `calibrated` | the score with the negative examples' mean at 0 and the positive ones' at 1; NaN where unknown |

There is a row for each token that was kept. A trait has one vector, of one layer; rows of other layers project their
activations onto that vector. Its examples were read out at its own layer, so rows of other layers have no `calibrated`
score.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError
from tlcapture.prompts.spans import labels_of
from tlcapture.traits.token_scores import TokenScores

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("prompt_id", "sample", "token_idx", "token", "part", "span", "role", "trait", "layer", "score", "calibrated")

Layers = str | SupportsIndex | Iterable[SupportsIndex]


def tidy_frame(projections: Sequence[TokenScores], layers: Layers = "own") -> DataFrame:
    """A data frame with the columns `COLUMNS`, sorted by projection, then layer, then token.

    Args:
        layers: `own` (each vector's own layer), `all` (every stored layer), a layer, or several.

    Raises `InputError` for a layer that a projection does not have.
    """
    import pandas

    pieces: list[dict[str, Any]] = []
    for projection in projections:
        kept = list(projection.kept_tokens)
        n_kept = len(kept)
        labels = labels_of(projection.spans, len(projection.tokens))
        parts = np.where(np.array(kept, dtype=np.int64) < projection.n_prompt_tokens, "prompt", "response")
        for layer in _chosen(projection, layers):
            pieces.append(
                {
                    "prompt_id": [projection.prompt_id] * n_kept,
                    "sample": [projection.sample] * n_kept,
                    "token_idx": kept,
                    "token": [projection.tokens[token] for token in kept],
                    "part": parts.tolist(),
                    "span": [labels[token][0] for token in kept],
                    "role": [labels[token][1] for token in kept],
                    "trait": [projection.trait] * n_kept,
                    "layer": [layer] * n_kept,
                    "score": projection.at(layer)[kept].tolist(),
                    "calibrated": _calibrated(projection, layer)[kept].tolist(),
                }
            )
    columns = {name: [value for piece in pieces for value in piece[name]] for name in COLUMNS}
    kinds = {"sample": "Int64", "token_idx": "int64", "layer": "int64", "score": "float64", "calibrated": "float64"}
    return pandas.DataFrame(columns).astype(kinds)


def _calibrated(projection: TokenScores, layer: int) -> NDArray[np.float64]:
    found = projection.calibrated if layer == projection.layer else None
    return np.full(len(projection.tokens), np.nan) if found is None else found


def _chosen(projection: TokenScores, layers: Layers) -> list[int]:
    if isinstance(layers, str):
        if layers == "own":
            return [projection.layer]
        if layers == "all":
            return list(projection.layers)
        raise InputError(f"layers {layers!r}: expected 'own', 'all', a layer or several")
    chosen = layers if isinstance(layers, Iterable) else [layers]
    return [index(layer) for layer in chosen]
