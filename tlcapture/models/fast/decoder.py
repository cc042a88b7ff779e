"""Decode steps of a batch in buffers whose shape and place stay the same; on CUDA they are recorded and replayed.

The buffers hold the keys, values and mask of a batch, with room for its last position, and stay for
later batches, as do the recorded steps. Rows that have ended leave the state of the batch at once, and idle in the
recorded step until half of its rows do.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable, Set
from typing import Any

import torch
from torch import Tensor

from tlcapture.models.fast.cache import FastCache
from tlcapture.models.fast.fixed import FixedCache, FixedState
from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.recording import RecordedCall, Tape
from tlcapture.shapes import Tokens

_log = logging.getLogger(__name__)

# Kinds of devices on which steps have fixed shapes. On a CPU, reading only the existing keys is faster.
FIXED_ON = {"cuda", "cpu"} if os.environ.get("TLCAPTURE_FIXED_STEPS") == "1" else {"cuda"}
RECORD = os.environ.get("TLCAPTURE_CUDA_GRAPH", "1") != "0"  # whether steps on CUDA are recorded

_CAPACITY = 64  # capacities are multiples of it
_KEYS = 512  # the number of keys that a step reads is a multiple of it, or the capacity
_MOST_RECORDED = 32  # the oldest are dropped, also of those that have run once

Key = tuple[int, int, frozenset[str], tuple[Hashable, ...]]  # rows, keys, hooks, keys of recordable hooks
Result = tuple[Tensor, dict[str, Tensor]]  # logits of the last position, activations
# Tokens `[batch, 1]`, their mask, the cache and the hooks -> logits and activations.
Run = Callable[[Tensor, Tensor, FastCache, Set[str]], Result]


class Decoder:
    """The buffers of a batch, and the steps recorded for them.

    Attributes:
        records: whether steps on CUDA are recorded; no longer once that has failed.
        seconds: the time spent on recording, in seconds.
    """

    records = RECORD

    def __init__(self, n_rows: int, n_positions: int, shape: tuple[int, int, int], like: Tensor):
        n_layers, n_heads, d_head = shape
        with torch.inference_mode(False):
            self._store = torch.zeros(
                n_layers, 2, n_rows, n_heads, n_positions, d_head, dtype=like.dtype, device=like.device
            )
            self._mask = torch.zeros(n_rows, n_positions, dtype=torch.long, device=like.device)
            self._tokens = torch.zeros(n_rows, 1, dtype=torch.long, device=like.device)
            self._ones = torch.ones_like(self._tokens)
            self._position = torch.zeros(1, dtype=torch.long, device=like.device)
        self._tape = Tape(like.device) if like.is_cuda and self.records else None
        self._seen: dict[Key, None] = {}  # run once, and not recorded
        self._recorded: dict[Key, RecordedCall[Result]] = {}
        self._version: Any = None
        self.seconds = 0.0
        # Of the batch that `lend` lets use the buffers: its cache, the rows of its recorded step, its most positions,
        # and the mask that the last step made, `None` before the first.
        self._owner: Callable[[], FastCache | None] = lambda: None
        self._size = self._limit = 0
        self._adopted: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> None:
        """`None`: a copy of a model makes its own buffers, and a copy of a state does without."""

    def fits(self, n_rows: int, n_positions: int, like: Tensor) -> bool:
        """Whether no other batch uses the buffers, and a batch of a model with weights like `like` fits in them."""
        rows, positions = self._mask.shape
        has_room = n_rows <= rows and n_positions <= positions
        is_alike = (self._store.dtype, self._store.device) == (like.dtype, like.device)
        return has_room and is_alike and self._owner() is None

    def lend(self, cache: FastCache, n_positions: int) -> None:
        """Let the state of a new batch of up to `n_positions` use the buffers, which take over its content."""
        assert cache.state is not None
        n_rows = len(cache.state.mask)
        self._owner, self._size, self._limit = weakref.ref(cache), n_rows, n_positions
        self._adopted = None
        # Masked values are multiplied by zero, which gives NaN if an earlier batch left NaN or inf.
        store, held = self._store.zero_()[:, :, :n_rows], cache.state.store
        if held is not None:
            store[..., : cache.state.length, :] = held[..., : cache.state.length, :]
        cache.state.store = store
        cache.decoder = self

    def can_step(self, cache: FastCache, tokens: Tokens) -> bool:
        """Whether the buffers have the keys and values of a state and room for one token per row."""
        state = cache.state
        return (
            state is not None
            and not cache.frozen
            and cache.computed_by is not None
            and state.store is not None
            and state.store.data_ptr() == self._store.data_ptr()
            and state.store.stride() == self._store.stride()
            and tokens.shape == (len(state.mask), 1)
            and 0 < state.length < self._limit
        )

    def step(
        self,
        cache: FastCache,
        tokens: Tokens,
        hooks: Set[str],
        run: Run,
        *,
        is_hooked: bool,
        recordable: tuple[Hashable, ...] = (),
    ) -> Result:
        """Run the next token of each row of the state that was lent the buffers.

        Args:
            run: one call of the model.
            is_hooked: whether the model has hooks: they are called, and see the rows of the batch and the keys so far
                only.
            recordable: the keys of recordable hooks that are on, with which the step is recorded.

        Returns:
            Logits `[batch, d_vocab]` and activations by name. A recorded step overwrites them when it is replayed.
        """
        state = cache.state
        assert state is not None
        n_rows, start = state.mask.shape
        if state.mask is not self._adopted:
            self._adopt(cache)
        self._tokens[:n_rows].copy_(tokens)
        self._position.fill_(start)
        n_keys = start + 1 if is_hooked else min(self._limit, -(-(start + 1) // _KEYS) * _KEYS)
        if is_hooked or self._tape is None:
            logits, kept = self._call(cache, (n_rows, n_keys, frozenset(hooks), recordable), run)()
        else:
            self._size = _next_size(self._size, n_rows)
            logits, kept = self._replay(cache, (self._size, n_keys, frozenset(hooks), recordable), run)
        state.mask = cache.previous_attention_mask = self._adopted = self._mask[:n_rows, : start + 1]
        share = n_rows / len(logits)
        return logits[:n_rows], {name: _part(name, each, share, start + 1) for name, each in kept.items()}

    def _adopt(self, cache: FastCache) -> None:
        """Take over the mask of a state that another pass computed, or that rows have left."""
        assert cache.state is not None and cache.computed_by is not None
        if self._adopted is None:
            self._forget_unless(cache.computed_by)
        mask = cache.state.mask.clone()  # it may be a part of the buffer
        self._mask.zero_()
        self._mask[: len(mask), : mask.shape[1]] = mask

    def _forget_unless(self, fast: FastForward) -> None:
        """Forget the recorded steps if the weights have moved or options of the model have changed."""
        version = fast.version()
        if version != self._version:
            self._version = version
            self._recorded.clear()
            self._seen.clear()

    def _call(self, cache: FastCache, key: Key, run: Run) -> Callable[[], Result]:
        """A call of the model on some rows of the buffers and some of their keys."""
        n_rows, n_keys, hooks = key[:3]
        state = FixedState(self._mask[:n_rows, :n_keys], self._store[:, :, :n_rows], self._position, cache.length)
        fixed = FixedCache.over(state, cache)
        return lambda: run(self._tokens[:n_rows], self._ones[:n_rows], fixed, hooks)

    def _replay(self, cache: FastCache, key: Key, run: Run) -> Result:
        """Replay the step of a key; run it the first time, and record it the second time."""
        assert self._tape is not None and cache.computed_by is not None
        if key in self._recorded:
            return self._recorded[key].replay()
        call = self._call(cache, key, run)
        if key not in self._seen:
            _make_room(self._seen)
            self._seen[key] = None
            return self._tape.run(call)
        del self._seen[key]
        began = time.perf_counter()
        try:
            with torch.inference_mode(False):
                recorded = self._tape.record(call)
        except RuntimeError as error:
            self._tape = None
            if not isinstance(error, torch.OutOfMemoryError):
                Decoder.records = False
                _log.warning("decode steps are run, not replayed: %s", str(error).partition("\n")[0])
            self._recorded.clear()
            return call()
        finally:
            self.seconds += time.perf_counter() - began
        _make_room(self._recorded)
        recorded.holds = cache.computed_by.tensors()
        self._recorded[key] = recorded
        _log.debug("recorded a decode step of %d rows and %d keys; %.2f s so far", *key[:2], self.seconds)
        return recorded.replay()


def capacity(n_positions: int, n_ctx: int) -> int:
    """The number of positions of the buffers for a batch of up to `n_positions`."""
    return min(n_ctx, -(-n_positions // _CAPACITY) * _CAPACITY)


def _make_room(steps: dict[Key, Any]) -> None:
    """Drop the oldest step if there are too many."""
    if len(steps) >= _MOST_RECORDED:
        del steps[next(iter(steps))]


def _next_size(size: int, n_rows: int) -> int:
    """The rows of the recorded step: `size` until half of them idle, then the next power of two."""
    return size if size // 2 < n_rows <= size else 1 << (n_rows - 1).bit_length()


def _part(name: str, activation: Tensor, share: float, n_keys: int) -> Tensor:
    """The given share of an activation's rows, from the first on, and of an axis of keys those that exist so far."""
    part = activation[: round(share * len(activation))]  # queries and keys at their norms: one row per head
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        return part[..., :n_keys]
    return part[:, :n_keys] if name.endswith("hook_rot_k") else part
