"""Attention files of either form, read as one kind of object; and the compact form, written layer by layer.

    saved = read_attention(path)          # {id}_attention.json or {id}_attention.safetensors
    saved.entry(12).by_layer              # [n_layers][n_heads][13], null for a layer without weights
    saved.heads(3)                        # [n_heads, query, key]

The compact form has a tensor `layer.L` `[n_weights, n_heads]` for each layer, in float16: query by query, the weights
of the keys up to it. Loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tlcapture.errors import NumericalError, StorageError
from tlcapture.storage.compact.compact_files import compact_metadata, is_compact, open_compact
from tlcapture.storage.compact.safetensors_files import TensorSpec, write_safetensors
from tlcapture.storage.files import Written
from tlcapture.storage.rounding import WEIGHT_DIGITS, rounded_for_json
from tlcapture.storage.validation import not_valid
from tlcapture.views.json_files import AttentionEntry, AttentionHead, no_weights, pattern_of_layer
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.token_entries import TokenEntries, no_token

KIND = "attention"
_NUMBERS = "float16: 11 significant bits, and steps of 6e-8 below 6e-5"

Chunks = Iterable[NDArray[Any]]  # `[n_weights, n_heads]` of consecutive queries, those kept and those not


def read_attention(path: Path) -> SavedAttention:
    """A prompt's attention file of either form; raises `StorageError` for any other file."""
    return _CompactAttention(path) if is_compact(path) else _JsonAttention(path)


class SavedAttention(ABC):
    """The attention weights of a prompt in a file; only requested parts are read.

    Attributes:
        path: the file.
        head: the content of the file without the weights.
    """

    path: Path
    head: AttentionHead

    @property
    @abstractmethod
    def token_indices(self) -> list[int]:
        """The queries whose weights are in the file."""

    @abstractmethod
    def entry(self, token: int) -> AttentionEntry:
        """The weights of a query; raises `InputError` for one that the file does not have."""

    def heads(self, layer: int) -> NDArray[np.float32]:
        """A layer's weights `[n_heads, query, key]`, 0 after the query, NaN in the rows of queries not kept.

        Raises `InputError` for a layer without weights, and `StorageError` if the file is damaged.
        """
        if self.token_indices != list(self.head.positions_held.kept):
            raise StorageError(f"{self.path}: it does not have one entry per token")
        rows, n_tokens = list(self.rows([layer])), len(self.head.tokens)  # read before a damaged head is relied on
        patterns = np.full((self.head.n_heads, n_tokens, n_tokens), np.nan, dtype=np.float32)
        for _, query, weights in rows:
            patterns[:, query] = 0
            patterns[:, query, : query + 1] = weights
        return patterns

    @property
    @abstractmethod
    def present_layers(self) -> list[int]:
        """The layers that have weights."""

    @abstractmethod
    def rows(self, layers: Sequence[int]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Layer, query and the query's weights `[n_heads, query + 1]`, for some layers that have weights.

        Only one query's weights are in memory at a time. Raises `StorageError` if the file is damaged.
        """


class _JsonAttention(SavedAttention):
    def __init__(self, path: Path):
        self.path = path
        self._entries = TokenEntries(path)
        self.head = AttentionHead.of(self._entries.rest, path)

    @property
    def token_indices(self) -> list[int]:
        return self._entries.token_indices

    def entry(self, token: int) -> AttentionEntry:
        return AttentionEntry.of(self._entries[token], self.path, self.head)

    @property
    def present_layers(self) -> list[int]:
        entry: Any = next(iter(self._entries), {"by_layer": []})
        first = entry.get("by_layer") if isinstance(entry, Mapping) else None
        if not isinstance(first, list):
            raise not_valid(self.path, KIND, "attention[0].by_layer: expected a list")
        return [layer for layer in self.head.kept_layers if layer < len(first) and first[layer] is not None]

    def rows(self, layers: Sequence[int]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        for query, entry in zip(self.token_indices, self._entries, strict=True):
            for layer in layers:
                row = pattern_of_layer(entry, layer, self.path, self.head.layers)
                yield layer, query, _row(row, query, self.head, self.path)


def _row(weights: list[list[float]], query: int, head: AttentionHead, path: Path) -> NDArray[np.float32]:
    """The weights `[n_heads, query + 1]` of a query."""
    if len(weights) != head.n_heads or any(len(each) != query + 1 for each in weights):
        raise StorageError(f"{path}: expected patterns of {head.n_heads} heads and {len(head.tokens)} tokens")
    return np.array(weights, dtype=np.float32)


class _CompactAttention(SavedAttention):
    def __init__(self, path: Path):
        self.path = path
        self._file, content = open_compact(path, KIND)
        self.head = AttentionHead.of(content, path)
        self._held = self.head.positions_held
        self._ends = np.cumsum([0, *(query + 1 for query in self._held.kept)])
        self._present = [layer for layer in self.head.kept_layers if _name(layer) in self._file.specs]
        for layer in self._present:
            self._file.check(_name(layer), "F16", (int(self._ends[-1]), self.head.n_heads))
        others = sorted(self._file.specs.keys() - {_name(layer) for layer in self._present})
        if others or not self._present:
            problem = f"it has {others[0][:80]!r}, which is not a kept layer" if others else "it has no layer"
            raise not_valid(path, KIND, problem)

    @property
    def token_indices(self) -> list[int]:
        return list(self._held.kept)

    def entry(self, token: int) -> AttentionEntry:
        if token not in self._held.kept:
            raise no_token(self.path, token, is_partial=not self._held.is_all)
        row = self._held.kept.index(token)
        by_layer: list[Any] = [None] * self.head.n_layers
        for layer in self._present:
            weights = self._array(layer)[self._ends[row] : self._ends[row + 1]].T
            by_layer[layer] = _as_shown(self._checked(weights))
        content = {"token_idx": token, "context_size": token + 1, "by_layer": by_layer}
        return AttentionEntry.of(content, self.path, self.head)

    @property
    def present_layers(self) -> list[int]:
        return self._present

    def rows(self, layers: Sequence[int]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        for layer in layers:
            if layer not in self._present:
                raise no_weights(self.path, layer, self.head.layers, self._present)
            weights = self._array(layer)
            for row, query in enumerate(self._held.kept):
                own = self._checked(weights[self._ends[row] : self._ends[row + 1]])
                yield layer, query, own.T.astype(np.float32)

    def _array(self, layer: int) -> NDArray[Any]:
        return self._file.array(_name(layer))

    def _checked(self, weights: NDArray[Any]) -> NDArray[Any]:
        if not ((weights >= 0) & (weights <= 1)).all():  # NaN too
            raise not_valid(self.path, KIND, "a weight is not between 0 and 1")
        return weights


def _as_shown(weights: NDArray[Any]) -> list[list[float]]:
    """Weights with as many digits as the JSON form has."""
    shown = rounded_for_json(weights.astype(np.float32), WEIGHT_DIGITS)
    found: list[list[float]] = orjson.loads(orjson.dumps(shown, option=orjson.OPT_SERIALIZE_NUMPY))
    return found


def _name(layer: int) -> str:
    return f"layer.{layer}"


def write_attention(
    path: Path, head: Mapping[str, Any], positions: Positions, layers: Sequence[int], chunks_of: Any
) -> Written:
    """Write a prompt's attention in the compact form, one layer after another.

    Args:
        head: the content of the JSON form without `attention`.
        positions: the queries whose weights are kept.
        layers: those with weights.
        chunks_of: gives the `Chunks` of a layer, of all queries.

    Raises:
        NumericalError: a weight is NaN or inf.
    """
    n_weights = sum(query + 1 for query in positions.kept)
    specs = {_name(layer): TensorSpec("F16", (n_weights, head["n_heads"])) for layer in layers}
    pieces = {_name(layer): _kept(chunks_of(layer), positions) for layer in layers}
    return write_safetensors(path, specs, compact_metadata(KIND, head, _NUMBERS), pieces)


def _kept(chunks: Chunks, positions: Positions) -> Chunks:
    """The kept queries' weights in float16, from chunks with the weights of all queries."""
    query, kept = 0, frozenset(positions.kept)
    for chunk in chunks:
        if not np.isfinite(chunk).all():
            raise NumericalError(f"{int((~np.isfinite(chunk)).sum())} of {chunk.size} numbers are NaN or inf")
        if positions.is_all:
            yield chunk.astype(np.float16)
            continue
        start = 0
        while start < len(chunk):
            stop = start + query + 1
            if query in kept:
                yield chunk[start:stop].astype(np.float16)
            start, query = stop, query + 1
