"""Recording the activations of a batch step by step, and returning them prompt by prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.generation.recording.device_buffers import (
    SHARE,
    DeviceBuffer,
    Triangles,
    columns_that_fit,
    n_weights,
    whole_patterns,
)
from tlcapture.generation.recording.pattern_spools import PatternSpool, SpooledPatterns, Spooling
from tlcapture.generation.recording.transfers import Copies, in_main_memory
from tlcapture.models.memory import free_memory
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import is_pattern

Kind = tuple[int | str, ...]
Part = Callable[[], Tensor]  # returns activations `[name, ...]`, once they have arrived in main memory


class Recorder:
    """Collects activations step by step and returns them prompt by prompt.

    A prompt's activations of one shape share a buffer in main memory, without padding. On a CPU every step is written
    into these buffers. On an accelerator a step is written into buffers there, from which activations are copied while
    the model goes on; where they do not fit, every step is copied. Only the triangles of patterns are kept, on
    disk if `spooling` says so.

    Prompts are numbered in the order of `prompt_lengths`, which are in tokens.
    """

    def __init__(
        self,
        names: Sequence[str],
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        spooling: Spooling | None = None,
    ):
        self.names = frozenset(names)
        self._order = list(dict.fromkeys(names))
        self._lengths = prompt_lengths
        self._max_new_tokens = max_new_tokens
        self._spooling = spooling
        self._filled = [0] * len(prompt_lengths)  # the tokens recorded of each prompt
        self._groups: dict[Kind, list[str]] = {}  # the names of each kind, in order
        self._stores: dict[Kind, Store] = {}
        self._copies: dict[torch.device, Copies] = {}

    def record(self, indices: Sequence[int], cache: Cache) -> None:
        """Record one step: the left-padded prompts with these indices, or the next token of each.

        `cache` has one row per index, `[batch, pos, ...]`, and its tensors are not kept.
        """
        if not self._groups:
            for name in self._order:
                self._check_shape(name, cache[name], indices)
                self._groups.setdefault(_kind(name, cache[name]), []).append(name)
        n_new = [1 if self._filled[index] else self._lengths[index] for index in indices]
        stop = self._next_column(indices)
        for kind, names in self._groups.items():
            activations = [cache[name] for name in names]
            if len({activation.device for activation in activations}) > 1:
                activations = [activation.to("cpu") for activation in activations]
            # Rotated keys have all columns so far.
            n_columns = min(each.shape[_token_axis(names[0])] for each in activations) if stop == self._width else 1
            if kind not in self._stores:
                make = self._store_of_patterns if is_pattern(names[0]) else self._store_of_rows
                self._stores[kind] = make(activations)
            self._stores[kind].write(indices, activations, stop, n_columns)
        for index, count in zip(indices, n_new, strict=True):
            self._filled[index] += count

    def _check_shape(self, name: str, activation: Tensor, indices: Sequence[int]) -> None:
        """Raise `InputError` for an activation of the first step that is not stored token by token."""
        shape, axis, longest = activation.shape, _token_axis(name), max(self._lengths)
        at_least = max(self._lengths[index] for index in indices)
        if len(shape) <= axis or shape[0] != len(indices) or not at_least <= shape[axis] <= longest:
            raise InputError(
                f"{name} does not lie token by token: its shape is {list(shape)} for {len(indices)} prompts of up to "
                f"{longest} tokens"
            )

    def take(self, index: int) -> Recorded:
        """All activations of a prompt: `[n_tokens, ...]` by name, in the prompt's own buffers.

        Reading an activation waits until it has arrived in main memory. A call that runs out of memory can be
        repeated.
        """
        parts, n_bytes, spools = [], 0, dict[str, tuple[PatternSpool, int]]()
        for kind, names in self._groups.items():
            store = self._stores[kind]
            if isinstance(store, SpooledPatterns):
                spool = store.take(index, self._filled[index])
                spools |= {name: (spool, hook) for hook, name in enumerate(names)}
                continue
            part, more = self._part(store, index)
            parts.append((names, part))
            n_bytes += more
        self.forget(index)
        return Recorded(self._order, parts, n_bytes, spools)

    def forget(self, index: int) -> None:
        """Drop the activations of a prompt that has ended."""
        self._filled[index] = 0
        for store in self._stores.values():
            if not isinstance(store, Triangles):  # those of all prompts are one tensor
                store.forget(index)

    def rewind(self, index: int, n_tokens: int) -> None:
        """Let the next token recorded of a prompt be the one after its first `n_tokens`."""
        self._filled[index] = n_tokens
        for store in self._stores.values():
            if isinstance(store, SpooledPatterns):  # all others write a token where it belongs
                store.rewind(index, n_tokens)

    def leave_devices(self) -> None:
        """Move the activations of all prompts that have not ended to main memory, where further steps are recorded."""
        for kind, store in self._stores.items():
            if isinstance(store, DeviceBuffer):
                moved = {
                    index: store.with_room(index, n_tokens) for index, n_tokens in enumerate(self._filled) if n_tokens
                }
                store.copies.wait(store.copies.mark())
                self._stores[kind] = RowBuffers(self._lengths, self._max_new_tokens, moved)
            elif isinstance(store, Triangles):
                store.leave_device()
            elif isinstance(store, SpooledPatterns):
                store.flush()

    def _part(self, store: RowBuffers | DeviceBuffer | Triangles, index: int) -> tuple[Part, int]:
        """The activations of a prompt in a store, and their bytes."""
        n_tokens = self._filled[index]
        if isinstance(store, Triangles):
            triangle = store.own(index, self._width - self._lengths[index], n_tokens)
            arrived = self._leaving(triangle)
            n_bytes = triangle[..., 0].numel() * n_tokens**2 * triangle.itemsize
            return lambda: whole_patterns(arrived(), n_tokens), n_bytes
        taken = store.take(index, n_tokens)
        part = _once_copied(taken, store.copies) if isinstance(store, DeviceBuffer) else lambda: taken
        return part, taken.nbytes

    def _leaving(self, tensor: Tensor) -> Part:
        """A tensor on its way to main memory."""
        if not _has_own_memory(tensor.device):
            tensor = tensor.to("cpu")
            return lambda: tensor
        copies = self._copies_from(tensor.device)
        copies.lend(tensor)
        target = in_main_memory(tensor.shape, tensor.dtype, pinned=True)
        copies.copy(target, tensor)
        return _once_copied(target, copies)

    def _copies_from(self, device: torch.device) -> Copies:
        if device not in self._copies:
            self._copies[device] = Copies(device)
        return self._copies[device]

    @property
    def _width(self) -> int:
        """The number of columns of the left-padded prompts; responses begin in the next column."""
        return max(self._lengths)

    def _next_column(self, indices: Sequence[int]) -> int:
        """The column after those of a step, in which all prompts are read or all continue."""
        n_filled = self._filled[indices[0]]
        return self._width + (n_filled + 1 - self._lengths[indices[0]] if n_filled else 0)

    def _store_of_rows(self, activations: Sequence[Tensor]) -> RowBuffers | DeviceBuffer:
        """Where to record activations of one shape: on the accelerator that they are on if there is room."""
        first, n_hooks = activations[0], len(activations)
        if _has_own_memory(first.device):
            n_columns, free = self._width + self._max_new_tokens, free_memory(first.device)
            if n_held := columns_that_fit(first, n_hooks, len(self._lengths), n_columns, free):
                copies = self._copies_from(first.device)
                return DeviceBuffer(first, n_hooks, self._lengths, self._max_new_tokens, n_held, copies)
        return RowBuffers(self._lengths, self._max_new_tokens)

    def _store_of_patterns(self, patterns: Sequence[Tensor]) -> SpooledPatterns | Triangles:
        """Where to record patterns: on disk if they are too large, else on the device that they are on if they fit."""
        first, n_hooks, n_rows = patterns[0], len(patterns), len(self._lengths)
        n_columns = self._width + self._max_new_tokens
        n_weights_of_row = n_hooks * first.shape[1] * n_weights(n_columns)
        if self._spooling is not None and n_weights_of_row > self._spooling.above:
            return SpooledPatterns(self._spooling.folder, first, n_hooks, self._lengths)
        n_bytes = n_rows * n_weights_of_row * first.itemsize
        fits = _has_own_memory(first.device) and n_bytes <= SHARE * free_memory(first.device)
        return Triangles(first, n_hooks, n_rows, n_columns, first.device if fits else torch.device("cpu"))


class RowBuffers:
    """Activations of one shape in main memory: `[hook, token, ...]` for each prompt, without padding.

    Args:
        lengths: tokens of each prompt; columns are the positions of the left-padded batch.
        buffers: what has been recorded of some prompts, by index, with room for all of their tokens.
    """

    def __init__(self, lengths: Sequence[int], max_new_tokens: int, buffers: Mapping[int, Tensor] = {}):
        self._starts = [max(lengths) - length for length in lengths]
        self._n_columns = max(lengths) + max_new_tokens
        self._buffers = dict(buffers)

    def write(self, indices: Sequence[int], activations: Sequence[Tensor], stop: int, n_columns: int) -> None:
        """Write the last `n_columns` of activations `[batch, pos, ...]` of these rows; `stop` is the column after."""
        first = [max(stop - n_columns, self._starts[index]) for index in indices]
        # A token of each prompt leaves its device as one tensor. Whole prompts, stacked, would take their memory twice.
        stacked = torch.stack(list(activations)).to("cpu") if min(first) == stop - 1 else None
        on_cpu = [] if stacked is not None else [each.to("cpu") for each in activations]
        for row, (index, column) in enumerate(zip(indices, first, strict=True)):
            start = self._starts[index]
            target = self._buffer(index, activations)[:, column - start : stop - start]
            if stacked is None:
                torch.stack([each[row, column - stop :] for each in on_cpu], out=target)
            else:
                target.copy_(stacked[:, row, -1:])

    def take(self, index: int, n_tokens: int) -> Tensor:
        """A prompt's activations `[hook, n_tokens, ...]`."""
        return self._buffers[index][:, :n_tokens]

    def forget(self, index: int) -> None:
        """Drop a prompt's activations, to be freed once nobody else holds them."""
        self._buffers.pop(index, None)

    def _buffer(self, index: int, like: Sequence[Tensor]) -> Tensor:
        if index not in self._buffers:
            shape = (len(like), self._n_columns - self._starts[index], *like[0].shape[2:])
            self._buffers[index] = torch.empty(shape, dtype=like[0].dtype)
        return self._buffers[index]


Store: TypeAlias = RowBuffers | DeviceBuffer | Triangles | SpooledPatterns  # of the activations of a kind


def _once_copied(target: Tensor, copies: Copies) -> Part:
    """A tensor in main memory, once all copies begun so far have arrived."""
    mark = copies.mark()

    def arrived() -> Tensor:
        copies.wait(mark)
        return target

    return arrived


class Recorded(Mapping[str, Tensor]):
    """Activations by name, which are waited for when they are read; `n_bytes` is the memory that they take.

    Patterns that are on disk, in `spools` with the index of their hook, are read whenever they are asked for.
    """

    def __init__(
        self,
        order: Sequence[str],
        parts: Sequence[tuple[Sequence[str], Part]],
        n_bytes: int,
        spools: Mapping[str, tuple[PatternSpool, int]] = {},
    ):
        self.n_bytes = n_bytes
        self._spools = spools
        self._order = order
        self._parts = {name: (names, part) for names, part in parts for name in names}
        self._arrived: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def triangle(self, name: str) -> Iterator[Tensor] | None:
        """The weights `[n_weights, n_heads]` of patterns that are on disk, in chunks; `None` for any others."""
        if name not in self._spools:
            return None
        spool, hook = self._spools[name]
        return spool.triangle(hook)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._spools:
            spool, hook = self._spools[name]
            return spool.pattern(hook)
        with self._lock:
            if name not in self._arrived:
                names, part = self._parts[name]
                self._arrived.update(zip(names, part().unbind(), strict=True))
                for each in names:
                    del self._parts[each]
            return self._arrived[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class Together(Mapping[str, Tensor]):
    """The activations of several passes over the same tokens; `n_bytes` is the memory that they take."""

    def __init__(self, caches: Sequence[Cache]):
        self.n_bytes = sum(map(n_bytes_of, caches))
        self._of = {name: cache for cache in caches for name in cache}

    def triangle(self, name: str) -> Iterator[Tensor] | None:
        """See `Recorded.triangle`."""
        cache = self._of[name]
        return cache.triangle(name) if isinstance(cache, Recorded) else None

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def n_bytes_of(cache: Cache) -> int:
    """The memory that activations take, without waiting for them."""
    return cache.n_bytes if isinstance(cache, Recorded | Together) else sum(each.nbytes for each in cache.values())


def check_hooks(hooks: Sequence[str]) -> None:
    """Raise `InputError` for a hook whose activations are not stored token by token."""
    for name in hooks:
        if name.endswith("hook_attn_scores") or name.startswith(("ln_final", "unembed")):
            raise InputError(
                f"{name} is not captured: expected hook points of the embedding and of blocks, attention scores apart "
                "(hook_pattern has their softmax)"
            )


def _kind(name: str, activation: Tensor) -> Kind:
    """The properties that must be equal for activations to share a buffer."""
    if is_pattern(name):
        return ("pattern", activation.shape[1], str(activation.dtype))
    return (*activation.shape[2:], str(activation.dtype))


def _token_axis(name: str) -> int:
    """The axis of the tokens of a step; patterns are `[batch, head, query, key]`."""
    return 2 if is_pattern(name) else 1


def _has_own_memory(device: torch.device) -> bool:
    """Whether the device has its own memory, which it copies from while it works."""
    return device.type == "cuda"
