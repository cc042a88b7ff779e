"""Attention patterns on disk while a prompt runs: for each query the weights of keys up to it, in chunks of queries.

A long prompt's patterns are larger than memory. The weights of each step are gathered until they fill a chunk, which
is appended to a file without a name, so that nothing is left of it when the process ends, however it ends.

    patterns = SpooledPatterns(folder, lengths)
    patterns.write(indices, cached, stop, n_columns)      # every step
    spool = patterns.take(index, n_tokens)
    for chunk in spool.triangle(hook): ...               # [weight, head], queries in their order
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import StorageError
from tlcapture.generation.recording.device_buffers import n_weights
from tlcapture.views.attention import lower_triangle

CHUNK = 256  # queries that are written together
_MOST_PENDING = {"cpu": 2**22}  # bytes that wait for the rest of their chunk, by kind of device
_MOST_PENDING_ELSEWHERE = 2**28
Chunk = Float[Tensor, "n_weights n_heads"]


@dataclass(frozen=True)
class Spooling:
    """Where patterns are kept while prompts run: in a folder, for prompts with more than a number of weights."""

    folder: Path
    above: int


@dataclass(frozen=True)
class _Stored:
    """A chunk in the file: its queries, and the offset of its weights of the first hook, counted in weights."""

    first: int
    stop: int
    offset: int

    @property
    def n_weights(self) -> int:
        return n_weights(self.stop) - n_weights(self.first)


@dataclass
class PatternSpool:
    """The patterns of one prompt, by hook (the layers that are watched, in their order)."""

    folder: Path
    n_hooks: int
    n_heads: int
    dtype: torch.dtype
    _chunks: list[_Stored] = field(default_factory=list)
    _file: IO[bytes] | None = None

    @property
    def n_tokens(self) -> int:
        """The queries that are stored."""
        return self._chunks[-1].stop if self._chunks else 0

    def append(self, n_queries: int, part: Callable[[int], Chunk]) -> None:
        """Append the next queries; `part` is called for the weights of one hook after another.

        Raises `StorageError` if the device is full.
        """
        first = self.n_tokens
        chunk = _Stored(first, first + n_queries, self._end)
        for hook in range(self.n_hooks):
            weights = part(hook)
            assert weights.shape == (chunk.n_weights, self.n_heads), (weights.shape, chunk)
            self._write(self._at(chunk, hook), weights)
        self._chunks.append(chunk)

    def cut(self, n_tokens: int) -> None:
        """Let the next query be the one after the first `n_tokens`."""
        while self.n_tokens > n_tokens:
            last = self._chunks[-1]
            kept = n_weights(max(n_tokens, last.first)) - n_weights(last.first)
            parts = [self._read(last, hook)[:kept] for hook in range(self.n_hooks)]
            self._chunks.pop()
            if kept:
                self.append(n_tokens - last.first, parts.__getitem__)

    def triangle(self, hook: int) -> Iterator[Chunk]:
        """The weights of a hook, in chunks of queries."""
        return (self._read(chunk, hook) for chunk in self._chunks)

    def pattern(self, hook: int) -> Float[Tensor, "n_heads n_queries n_tokens"]:
        """The weights of a hook as a square, zero above the diagonal."""
        whole = torch.zeros(self.n_heads, self.n_tokens, self.n_tokens, dtype=self.dtype)
        for chunk, weights in zip(self._chunks, self.triangle(hook), strict=True):
            ends = [n_weights(query) - n_weights(chunk.first) for query in range(chunk.first, chunk.stop + 1)]
            for query, (start, stop) in enumerate(pairwise(ends), chunk.first):
                whole[:, query, : query + 1] = weights[start:stop].T
        return whole

    @property
    def _end(self) -> int:
        last = self._chunks[-1] if self._chunks else _Stored(0, 0, 0)
        return self._at(last, self.n_hooks)

    def _at(self, chunk: _Stored, hook: int) -> int:
        return chunk.offset + hook * chunk.n_weights * self.n_heads

    def _write(self, start: int, weights: Chunk) -> None:
        data = memoryview(weights.contiguous().view(torch.uint8).numpy().reshape(-1))
        at = start * self.dtype.itemsize
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  open as long as the spool
            while data:
                written = os.pwrite(self._file.fileno(), data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise StorageError(f"{self.folder}: attention patterns cannot be kept there: {error.strerror}") from None

    def _read(self, chunk: _Stored, hook: int) -> Chunk:
        assert self._file is not None
        n_numbers, start = chunk.n_weights * self.n_heads, self._at(chunk, hook)
        data = bytearray(n_numbers * self.dtype.itemsize)
        into, at = memoryview(data), start * self.dtype.itemsize
        while into:
            found = os.preadv(self._file.fileno(), [into], at)
            if not found:
                raise StorageError(f"{self.folder}: attention patterns that were kept there are gone")
            into, at = into[found:], at + found
        return torch.frombuffer(data, dtype=self.dtype).view(chunk.n_weights, self.n_heads)


@dataclass(frozen=True, eq=False)
class _Step:
    """The next query of some rows, `[row, hook, head, key]`, whose keys end before the column `stop`."""

    indices: tuple[int, ...]
    weights: Tensor
    stop: int


class SpooledPatterns:
    """The patterns of a batch of left-padded prompts, each prompt's in its own spool.

    Args:
        like: a pattern `[batch, head, pos, key]`.
        n_hooks: the number of hooks.
        lengths: tokens of each prompt.
    """

    def __init__(self, folder: Path, like: Tensor, n_hooks: int, lengths: Sequence[int]):
        self._spools = [PatternSpool(folder, n_hooks, like.shape[1], like.dtype) for _ in lengths]
        self._first = [max(lengths) - length for length in lengths]  # the column of each prompt's first token
        self._most_pending = _MOST_PENDING.get(like.device.type, _MOST_PENDING_ELSEWHERE)
        self._pending: list[_Step] = []
        self._n_pending = 0  # bytes

    def write(self, indices: Sequence[int], patterns: Sequence[Tensor], stop: int, n_columns: int) -> None:
        """Write patterns `[batch, head, pos, key]` of the last `n_columns` queries before the column `stop`."""
        if n_columns == 1:
            n_keys = min(stop, patterns[0].shape[-1])
            weights = torch.stack([pattern[:, :, -1, -n_keys:] for pattern in patterns], dim=1)
            self._pending.append(_Step(tuple(indices), weights, stop))
            self._n_pending += weights.nbytes
            if len(self._pending) >= CHUNK or self._n_pending >= self._most_pending:
                self.flush()
            return
        for row, index in enumerate(indices):
            n_tokens = stop - self._first[index]
            own = [pattern[row, :, -n_tokens:, -n_tokens:] for pattern in patterns]
            for first in range(0, n_tokens, CHUNK):
                last = min(first + CHUNK, n_tokens)
                self._spools[index].append(last - first, partial(_lower, own, first, last))

    def flush(self) -> None:
        """Write weights that are waiting for their chunk to fill."""
        steps, self._pending, self._n_pending = self._pending, [], 0
        if not steps:
            return
        whole = torch.cat([step.weights.reshape(-1) for step in steps]).cpu()  # as one copy from an accelerator
        weights = [
            piece.view(step.weights.shape)
            for piece, step in zip(whole.split([step.weights.numel() for step in steps]), steps, strict=True)
        ]
        for index in dict.fromkeys(index for step in steps for index in step.indices):
            own = [
                each[step.indices.index(index)][..., self._first[index] - step.stop :]
                for each, step in zip(weights, steps, strict=True)
                if index in step.indices
            ]
            self._spools[index].append(len(own), partial(_of_steps, own))

    def take(self, index: int, n_tokens: int) -> PatternSpool:
        """Hand over the patterns of a prompt, which has `n_tokens` tokens."""
        self.flush()
        spool = self._spools[index]
        spool.cut(n_tokens)
        self.forget(index)
        return spool

    def forget(self, index: int) -> None:
        """Drop the patterns of a prompt that has ended."""
        self.flush()
        old = self._spools[index]
        self._spools[index] = PatternSpool(old.folder, old.n_hooks, old.n_heads, old.dtype)

    def rewind(self, index: int, n_tokens: int) -> None:
        """Let the next token of a prompt be the one after its first `n_tokens`."""
        self.flush()
        self._spools[index].cut(n_tokens)


def _lower(patterns: Sequence[Tensor], first: int, stop: int, hook: int) -> Chunk:
    """The weights `[n_weights, n_heads]` of some queries of one of the patterns `[head, query, key]`, on the CPU."""
    return lower_triangle(patterns[hook], first, stop).contiguous().cpu()


def _of_steps(steps: Sequence[Tensor], hook: int) -> Chunk:
    """The weights of one hook in steps `[hook, head, key]` of consecutive queries."""
    return torch.cat([weights[hook].T for weights in steps])
