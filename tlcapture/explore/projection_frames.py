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

from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError
from tlcapture.prompts.spans import labels_of
from tlcapture.traits.projections.token_scores import TokenScores

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("prompt_id", "sample", "token_idx", "token", "part", "span", "role", "trait", "layer", "score", "calibrated")

_NUMBERS = {"token_idx": "int64", "layer": "int64", "score": "float64", "calibrated": "float64"}

Layers = str | SupportsIndex | Iterable[SupportsIndex]


def tidy_frame(projections: Iterable[TokenScores], layers: Layers = "own") -> DataFrame:
    """A data frame with the columns `COLUMNS`, sorted by projection, then layer, then token.

    Args:
        projections: those of one capture or of many, of which one at a time is used.
        layers: `own` (each vector's own layer), `all` (every stored layer), a layer, or several.

    Raises `InputError` for a layer that a projection does not have.
    """
    import pandas

    texts: dict[str, list[Any]] = {name: [] for name in COLUMNS if name not in _NUMBERS}
    numbers: dict[str, list[NDArray[Any]]] = {name: [np.empty(0, kind)] for name, kind in _NUMBERS.items()}
    known: dict[str, str] = {}  # equal tokens are one text
    for projection in projections:
        kept = list(projection.kept_tokens)
        n_kept = len(kept)
        labels = labels_of(projection.spans, len(projection.tokens))
        for layer in _chosen(projection, layers):
            texts["prompt_id"] += [projection.prompt_id] * n_kept
            texts["sample"] += [projection.sample] * n_kept
            texts["token"] += [known.setdefault(text, text) for token in kept for text in [projection.tokens[token]]]
            texts["part"] += ["prompt" if token < projection.n_prompt_tokens else "response" for token in kept]
            texts["span"] += [labels[token][0] for token in kept]
            texts["role"] += [labels[token][1] for token in kept]
            texts["trait"] += [projection.trait] * n_kept
            numbers["token_idx"].append(np.array(kept, np.int64))
            numbers["layer"].append(np.full(n_kept, layer))
            numbers["score"].append(projection.at(layer)[kept])
            numbers["calibrated"].append(_calibrated(projection, layer)[kept])
    columns = {**texts, **{name: np.concatenate(pieces) for name, pieces in numbers.items()}}
    return pandas.DataFrame({name: columns[name] for name in COLUMNS}).astype({"sample": "Int64"})


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
