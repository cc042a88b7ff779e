"""Recording the activations of a batch step by step, and returning them prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.views.cache import Cache
from tlcapture.views.hooks import is_pattern

Kind = tuple[int | str, ...]
PATTERN: Kind = ("pattern",)
_SHARE = 0.5  # of an accelerator's free memory that recorded activations may take


class Recorder:
    """Collects activations step by step and returns them prompt by prompt.

    A prompt's activations of one shape share a buffer `[name, token, ...]` in main memory, without padding. On a CPU
    every step is written into these buffers. On an accelerator, a batch's steps stay there, in a buffer
    `[name, prompt, column, ...]` whose columns are the positions of the left-padded batch, and a prompt's activations
    are copied to main memory once, when it has ended; where that buffer does not fit, every step is copied.
    Patterns, whose last axis grows, are kept step by step.

    Prompts are numbered in the order of `prompt_lengths`, which are in tokens.
    """

    def __init__(self, names: Sequence[str], prompt_lengths: Sequence[int], max_new_tokens: int):
        self.names = frozenset(names)
        self._order = list(dict.fromkeys(names))
        self._lengths = prompt_lengths
        self._max_new_tokens = max_new_tokens
        self._filled = [0] * len(prompt_lengths)
        self._groups: dict[Kind, list[str]] = {}
        self._buffers: dict[tuple[Kind, int], Tensor] = {}
        self._on_device: dict[Kind, Tensor | None] = {}  # `None` where the buffer does not fit
        self._patterns: list[tuple[list[int], Tensor]] = []

    def record(self, indices: Sequence[int], cache: Cache) -> None:
        """Record one step: the left-padded prompts with these indices, or the next token of each.

        `cache` has one row per index, `[batch, pos, ...]`.
        """
        if not self._groups:
            for name in self._order:
                self._check_shape(name, cache[name], indices)
                self._groups.setdefault(_kind(name, cache[name]), []).append(name)
        n_new = [1 if self._filled[index] else self._lengths[index] for index in indices]
        for kind, names in self._groups.items():
            activations = [cache[name] for name in names]
            if len({activation.device for activation in activations}) > 1:
                activations = [activation.to("cpu") for activation in activations]
            if kind == PATTERN:
                self._patterns.append((list(indices), torch.stack(activations).to("cpu")))
            elif (buffer := self._device_buffer(kind, activations)) is not None:
                self._write_on_device(buffer, indices, activations)
            else:
                self._write(kind, indices, n_new, activations)
        for index, count in zip(indices, n_new, strict=True):
            self._filled[index] += count

    def _check_shape(self, name: str, activation: Tensor, indices: Sequence[int]) -> None:
        """Raise `InputError` for an activation of the first step that does not lie token by token."""
        shape, axis, longest = activation.shape, 2 if is_pattern(name) else 1, max(self._lengths)
        at_least = max(self._lengths[index] for index in indices)
        if len(shape) <= axis or shape[0] != len(indices) or not at_least <= shape[axis] <= longest:
            raise InputError(
                f"{name} does not lie token by token: its shape is {list(shape)} for {len(indices)} prompts of up to "
                f"{longest} tokens"
            )

    def take(self, index: int) -> Cache:
        """All activations of a prompt: `[n_tokens, ...]` by name, in the prompt's own buffers."""
        cache: dict[str, Tensor] = {}
        for kind, names in self._groups.items():
            if kind == PATTERN:
                whole = self._whole_pattern(index)
            elif (buffer := self._on_device[kind]) is not None:
                whole = self._leave_device(buffer, index)
            else:
                whole = self._buffers.pop((kind, index))[:, : self._filled[index]]
            cache.update(zip(names, whole.unbind(), strict=True))
        return {name: cache[name] for name in self._order}

    def _write(self, kind: Kind, indices: Sequence[int], n_new: Sequence[int], activations: list[Tensor]) -> None:
        # Long prompts are copied straight into their buffers; everything else leaves its device as one tensor.
        separately = activations[0].device.type == "cpu" and max(n_new) > 1
        stacked = None if separately else torch.stack(activations).to("cpu")
        for row, (index, count) in enumerate(zip(indices, n_new, strict=True)):
            target = self._buffer(kind, index, activations)[:, self._filled[index] : self._filled[index] + count]
            if stacked is None:
                torch.stack([activation[row, -count:] for activation in activations], out=target)
            else:
                target.copy_(stacked[:, row, -count:])

    @property
    def _width(self) -> int:
        """The columns of the left-padded prompts; a response begins in the next one."""
        return max(self._lengths)

    def _device_buffer(self, kind: Kind, activations: list[Tensor]) -> Tensor | None:
        """The buffer of a kind on the accelerator that the activations are on, made at the first step."""
        if kind not in self._on_device:
            first = activations[0]
            columns = self._width + self._max_new_tokens
            shape = (len(activations), len(self._lengths), columns, *first.shape[2:])
            fits = first.is_cuda and math.prod(shape) * first.itemsize <= _SHARE * _free(first.device)
            self._on_device[kind] = first.new_empty(shape) if fits else None
        return self._on_device[kind]

    def _write_on_device(self, buffer: Tensor, indices: Sequence[int], activations: list[Tensor]) -> None:
        """Write one step, in which all prompts are read, or all continue: its columns end at the same one."""
        n_filled = self._filled[indices[0]]
        stop = self._width + (n_filled + 1 - self._lengths[indices[0]] if n_filled else 0)
        n_columns = min(activation.shape[1] for activation in activations)  # rotated keys have all so far
        columns = slice(stop - n_columns, stop)
        stacked = torch.stack([activation[:, -n_columns:] for activation in activations])
        if len(indices) == indices[-1] + 1 - indices[0]:  # consecutive, as long as no prompt between them has ended
            buffer[:, indices[0] : indices[-1] + 1, columns] = stacked
        else:
            buffer[:, torch.tensor(indices, device=buffer.device), columns] = stacked

    def _leave_device(self, buffer: Tensor, index: int) -> Tensor:
        """A prompt's activations `[name, n_tokens, ...]` in main memory."""
        start = self._width - self._lengths[index]
        block = buffer[:, index, start : start + self._filled[index]]
        pinned = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)  # pageable memory takes longer to reach
        return pinned.copy_(block)

    def _buffer(self, kind: Kind, index: int, activations: list[Tensor]) -> Tensor:
        if (kind, index) not in self._buffers:
            shape = (len(activations), self._lengths[index] + self._max_new_tokens, *activations[0].shape[2:])
            self._buffers[kind, index] = torch.empty(shape, dtype=activations[0].dtype)
        return self._buffers[kind, index]

    def _whole_pattern(self, index: int) -> Tensor:
        """`[name, head, n_tokens, n_tokens]` from the pieces `[name, head, pos, key]` of all steps."""
        pieces = [stacked[:, indices.index(index)] for indices, stacked in self._patterns if index in indices]
        length = self._lengths[index]
        n_tokens = length + len(pieces) - 1
        whole = pieces[0].new_zeros(*pieces[0].shape[:2], n_tokens, n_tokens)
        whole[:, :, :length, :length] = pieces[0][:, :, -length:, -length:]
        for token, piece in enumerate(pieces[1:], start=length):
            whole[:, :, token, : token + 1] = piece[:, :, 0, -(token + 1) :]
        return whole


def check_hooks(hooks: Sequence[str]) -> None:
    """Raise `InputError` for a hook whose activations are not stored token by token."""
    for name in hooks:
        if name.endswith("hook_attn_scores") or name.startswith(("ln_final", "unembed")):
            raise InputError(
                f"{name} is not captured: expected hook points of the embedding and of blocks, attention scores apart "
                "(hook_pattern has their softmax)"
            )


def _kind(name: str, activation: Tensor) -> Kind:
    """What has to be equal for activations to share a buffer."""
    return PATTERN if is_pattern(name) else (*activation.shape[2:], str(activation.dtype))


def _free(device: torch.device) -> int:
    """Free bytes of an accelerator, including those that torch holds for tensors to come."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
