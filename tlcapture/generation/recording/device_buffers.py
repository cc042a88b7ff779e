"""Activations of a batch on its device, until they leave for main memory while the model goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from psutil import virtual_memory
from torch import Tensor

from tlcapture.generation.recording.transfers import Copies, in_main_memory
from tlcapture.models.streams import upload

_CHUNK = 32  # columns that leave together
_FEW = 256  # new tokens up to which main memory for all of them is taken from the start
_PINNED = 0.25  # of free main memory that may be pinned
_MOST_TOGETHER = 8  # rows that share pinned memory
SHARE = 0.5  # of an accelerator's free memory that recorded activations may take


class DeviceBuffer:
    """Activations of one shape, `[row, column, hook, ...]`: rows are prompts, and hooks are counted.

    Columns are the positions of the left-padded batch. If all fit, they leave in chunks while the response is
    generated, or as a whole when it has ended if it may become long; otherwise the buffer holds one chunk of columns
    at a time, and the device waits for their copies before it writes the next.

    Args:
        like: an activation `[batch, pos, ...]`.
        lengths: tokens of each prompt.
        n_held: the columns that the buffer holds.
    """

    def __init__(
        self, like: Tensor, n_hooks: int, lengths: Sequence[int], max_new_tokens: int, n_held: int, copies: Copies
    ):
        self._buffer = like.new_empty(len(lengths), n_held, n_hooks, *like.shape[2:])
        self.copies = copies
        copies.lend(self._buffer)
        self._width = max(lengths)
        self._max_new_tokens = max_new_tokens
        self._n_held = n_held
        self._is_whole = n_held >= self._width + max_new_tokens
        a_row = (self._width + max_new_tokens) * math.prod(self._buffer.shape[2:]) * like.itemsize
        self._n_together = pinned_together(a_row) if max_new_tokens <= _FEW else 1
        pinned = -(-len(lengths) // self._n_together) * _bytes_pinned(self._n_together * a_row)
        self._is_pinned = self._is_whole and pinned <= _PINNED * virtual_memory().available
        self._starts = [self._width - length for length in lengths]
        self._left = list(self._starts)  # the first column of each row that has not left yet
        self._targets: dict[int, Tensor] = {}
        self._reserved: dict[int, Tensor] = {}  # pinned memory of rows whose neighbours have theirs already

    def write(self, indices: Sequence[int], activations: Sequence[Tensor], stop: int, n_columns: int) -> None:
        """Write the last `n_columns` of activations `[batch, pos, ...]` of these rows; `stop` is the column after."""
        column = stop - n_columns
        while column < stop:
            last = min(stop, column - column % self._n_held + self._n_held)
            if not self._is_whole and column % self._n_held == 0:
                self.copies.hold_up_device()
            pieces = [each[:, each.shape[1] - stop + column : each.shape[1] - stop + last] for each in activations]
            self._write_piece(indices, pieces, column % self._n_held)
            if not self._is_whole and last % self._n_held == 0:
                self._leave(indices, last)
            column = last
        if self._is_whole and self._max_new_tokens <= _FEW:
            self._leave(indices, stop - stop % _CHUNK)

    def take(self, index: int, n_tokens: int) -> Tensor:
        """A row's activations `[hook, n_tokens, ...]` in main memory, once the copies begun so far are done."""
        self._leave([index], self._starts[index] + n_tokens, n_tokens)
        return self._targets[index][:n_tokens].transpose(0, 1)

    def with_room(self, index: int, n_tokens: int) -> Tensor:
        """As `take`, with room for all tokens that the row may get: `[hook, token, ...]`."""
        self._leave([index], self._starts[index] + n_tokens)
        return self._targets[index].transpose(0, 1)

    def forget(self, index: int) -> None:
        """Release a row's activations in main memory, to be freed once nobody else holds them."""
        self._targets.pop(index, None)

    def _write_piece(self, indices: Sequence[int], pieces: Sequence[Tensor], first: int) -> None:
        n_columns = pieces[0].shape[1]
        if n_columns == 1:
            _write_rows(self._buffer[:, first], indices, torch.stack([piece[:, 0] for piece in pieces], dim=1))
            return
        for hook, piece in enumerate(pieces):  # stacked, whole prompts would take their memory twice
            _write_rows(self._buffer[:, first : first + n_columns, hook], indices, piece)

    def _leave(self, indices: Sequence[int], stop: int, n_tokens: int | None = None) -> None:
        """Copy the columns before `stop` of these rows to main memory, if they have not left yet."""
        for index in indices:
            first, start = self._left[index], self._starts[index]
            if first < stop:
                source = self._buffer[index, first % self._n_held : (stop - 1) % self._n_held + 1]
                self.copies.copy(self._target(index, n_tokens)[first - start : stop - start], source)
                self._left[index] = stop

    def _target(self, index: int, n_tokens: int | None) -> Tensor:
        if index not in self._targets:
            if self._is_pinned and n_tokens is None:
                self._targets[index] = self._pinned(index)
            else:
                shape = (n_tokens or self._most_tokens(index), *self._buffer.shape[2:])
                self._targets[index] = in_main_memory(shape, self._buffer.dtype, pinned=self._is_pinned)
        return self._targets[index]

    def _pinned(self, index: int) -> Tensor:
        """Pinned memory for all tokens that a row may get, which it shares with its neighbours."""
        if index not in self._reserved:
            first = index - index % self._n_together
            rows = range(first, min(first + self._n_together, len(self._starts)))
            sizes = [self._most_tokens(row) for row in rows]
            whole = in_main_memory((sum(sizes), *self._buffer.shape[2:]), self._buffer.dtype, pinned=True)
            self._reserved |= zip(rows, whole.split(sizes), strict=True)
        return self._reserved.pop(index)

    def _most_tokens(self, index: int) -> int:
        return self._width - self._starts[index] + self._max_new_tokens


def _write_rows(target: Tensor, indices: Sequence[int], values: Tensor) -> None:
    """Write values into some rows of a tensor."""
    if len(indices) == indices[-1] + 1 - indices[0]:  # consecutive, as long as no prompt between them has ended
        target[indices[0] : indices[-1] + 1] = values
    else:
        target.index_copy_(0, upload(indices, target.device), values)


def pinned_together(n_bytes: int) -> int:
    """How many rows of so many bytes torch pins with the least waste: it takes a power of two each time."""
    return min(range(1, _MOST_TOGETHER + 1), key=lambda n_rows: _bytes_pinned(n_rows * n_bytes) / n_rows)


def _bytes_pinned(n_bytes: int) -> int:
    """The bytes that torch pins for a tensor."""
    return 1 << max(0, n_bytes - 1).bit_length()


def columns_that_fit(like: Tensor, n_hooks: int, n_rows: int, n_columns: int, free: int) -> int:
    """The number of columns for which a `DeviceBuffer` has room: all, a chunk, or 0.

    Args:
        like: an activation `[batch, pos, ...]`.
        free: free bytes of the device.
    """
    a_column = n_rows * n_hooks * math.prod(like.shape[2:]) * like.itemsize
    room = int(SHARE * free) // max(1, a_column)
    return n_columns if room >= n_columns else min(_CHUNK, room)


class Triangles:
    """Attention patterns, `[row, hook, head, weight]`: for each query the weights of the keys up to it.

    Queries and keys are the columns of the left-padded batch; a query begins after the keys of those before it.
    """

    def __init__(self, like: Tensor, n_hooks: int, n_rows: int, n_columns: int, device: torch.device):
        """`like` is a pattern `[batch, head, pos, key]`; `device` is where to keep them."""
        shape = (n_rows, n_hooks, like.shape[1], n_weights(n_columns))
        self._buffer = torch.empty(shape, dtype=like.dtype, device=device)

    def write(self, indices: Sequence[int], patterns: Sequence[Tensor], stop: int, n_columns: int) -> None:
        """Write patterns `[batch, head, pos, key]` of the last `n_columns` queries before the column `stop`."""
        device = self._buffer.device
        first = stop - n_columns
        if n_columns == 1:
            n_keys = min(stop, patterns[0].shape[-1])
            stacked = torch.stack([pattern[:, :, -1, -n_keys:] for pattern in patterns], dim=1).to(device)
            _write_rows(self._buffer[..., n_weights(stop) - n_keys : n_weights(stop)], indices, stacked)
            return
        query, key = torch.tril_indices(n_columns, n_columns, device=device)
        at = (query + first) * (query + first + 1) // 2 + key + first
        for hook, pattern in enumerate(patterns):
            weights = pattern[:, :, -n_columns:, -n_columns:].to(device)
            flat = weights.flatten(2).index_select(2, query * n_columns + key)
            self._buffer[indices[0] : indices[-1] + 1, hook].index_copy_(2, at, flat)

    def leave_device(self) -> None:
        """Move to main memory, where further patterns are written too."""
        self._buffer = self._buffer.to("cpu")

    def own(self, index: int, start: int, n_tokens: int) -> Tensor:
        """The triangle `[hook, head, weight]` of a row's own tokens, which begin at the column `start`."""
        query, key = torch.tril_indices(n_tokens, n_tokens, device=self._buffer.device) + start
        return self._buffer[index].index_select(-1, query * (query + 1) // 2 + key)


def whole_patterns(triangle: Tensor, n_tokens: int) -> Tensor:
    """Patterns `[hook, head, n_tokens, n_tokens]` of a triangle `[hook, head, weight]`."""
    whole = triangle.new_zeros(*triangle.shape[:2], n_tokens, n_tokens)
    for token in range(n_tokens):
        whole[:, :, token, : token + 1] = triangle[:, :, n_weights(token) : n_weights(token + 1)]
    return whole


def n_weights(n_queries: int) -> int:
    """The number of weights of the first queries, each of which has one key more than the one before."""
    return n_queries * (n_queries + 1) // 2
