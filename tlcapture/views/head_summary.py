"""What the heads of a capture attend to on average: a number for each layer and head, from its attention file.

    summarised(read_attention(path)).measures["entropy"]     # [n_layers, n_heads]

The first token is never a query: it can only attend to itself. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError
from tlcapture.views.json_files import AttentionHead, no_weights
from tlcapture.views.saved_attention import SavedAttention

Weights = NDArray[np.float32]  # `[n_heads, query + 1]`


def _entropy(weights: Weights) -> Weights:
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    return -(weights * logs).sum(axis=1)


def _distance(weights: Weights) -> Weights:
    # Not a matrix product: some builds of NumPy warn of invalid values in products of finite numbers.
    return (weights * np.arange(weights.shape[1] - 1, -1, -1, dtype=np.float32)).sum(axis=1)


# Of one query: entropy in nats, mean number of tokens that it looks back, weights on single keys.
MEASURES: dict[str, Callable[[Weights], Weights]] = {
    "entropy": _entropy,
    "distance": _distance,
    "first": lambda weights: weights[:, 0],
    "previous": lambda weights: weights[:, -2],
    "self": lambda weights: weights[:, -1],
}


@dataclass(frozen=True, eq=False)
class HeadSummary:
    """Means over queries.

    Attributes:
        measures: by the names of `MEASURES`, `[n_layers, n_heads]`; NaN for layers without weights.
        n_queries: the number of queries that are averaged.
        part: the part that they are tokens of, `response` or `prompt`.
    """

    measures: dict[str, NDArray[np.float64]]
    n_queries: int
    part: str


class ReadByRow(Protocol):
    """Attention weights that are read query by query: those of a file, `SavedAttention`, or of a live capture."""

    @property
    def head(self) -> AttentionHead:
        """The tokens, and the numbers of layers and heads."""

    @property
    def present_layers(self) -> list[int]:
        """The layers that have weights."""

    def rows(self, layers: Sequence[int]) -> Iterator[tuple[int, int, Weights]]:
        """Layer, query and the query's weights `[n_heads, query + 1]`, for some layers that have weights."""


def summarised(saved: ReadByRow) -> HeadSummary:
    """The means over the response, or over the prompt if there are no weights of the response.

    Raises `StorageError` if a file is damaged.
    """
    n_prompt = saved.head.n_prompt_tokens
    found = _over(saved, range(n_prompt, len(saved.head.tokens)), "response")
    return found if found.n_queries else _over(saved, range(n_prompt), "prompt")


def _over(saved: ReadByRow, queries: range, part: str) -> HeadSummary:
    shape = (saved.head.n_layers, saved.head.n_heads)
    sums = {name: np.full(shape, np.nan) for name in MEASURES}
    layers, seen = saved.present_layers, set[int]()
    for found in sums.values():
        found[layers] = 0
    for layer, query, weights in saved.rows(layers):
        if query and query in queries:
            seen.add(query)
            for name, measure in MEASURES.items():
                sums[name][layer] += measure(weights)
    means = {name: found / len(seen) if seen else found * np.nan for name, found in sums.items()}
    return HeadSummary(means, len(seen), part)


def weights_of(saved: SavedAttention, layer: int, head: int | None) -> Iterator[tuple[int, Weights]]:
    """Each query of a layer with its weights `[query + 1]` in one head, or in the mean over all heads.

    Raises:
        InputError: the layer has no weights, or no such head.
        StorageError: the file is damaged.
    """
    if layer not in saved.present_layers:
        raise no_weights(saved.path, layer, saved.head.layers, saved.present_layers)
    if head is not None and head >= saved.head.n_heads:
        raise InputError(f"no head {head}: layer {layer} has heads 0 to {saved.head.n_heads - 1}")
    for _, query, weights in saved.rows([layer]):
        yield query, weights.mean(axis=0) if head is None else weights[head]
