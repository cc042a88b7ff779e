"""Random numbers for sampling: one stream per prompt, computed from counters on the device that uses them.

A stream is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") at a start of its
own: its n-th number is a function of the start and n. Integers are the same on every device, and a batch's other
rows change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tlcapture.models.streams import upload
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import Noise

_STEPS = 16  # steps whose noise is computed at once, which takes fewer kernels
_WITHOUT_FLOAT64 = ("mps", "xpu")  # noise is computed in float64 for its rare large values
_WEYL, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class GumbelNoise:
    """Standard Gumbel noise for each row of a batch, step by step.

    Args:
        starts: the start of each row's stream, from `stream_start`.
        width: the numbers of a step.
        n_steps: the maximum number of steps.
        first: the first step, counted from 0.
    """

    def __init__(self, starts: Sequence[int], width: int, n_steps: int, device: torch.device, first: int = 0):
        self._starts = upload(starts, device)
        self._width = width
        self._n_at_once = max(1, min(_STEPS, n_steps))
        self._device = device
        self._next = first
        self._ready: Tensor | None = None

    def next(self) -> Noise:
        """The noise of the next step, `[batch, width]` in float32."""
        within = self._next % self._n_at_once
        if self._ready is None or within == 0:
            self._ready = self._compute(self._next - within)
        self._next += 1
        return self._ready[within]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows except those with these indices."""
        index = upload(rows, self._device)
        self._starts = self._starts.index_select(0, index)
        if self._ready is not None:
            self._ready = self._ready.index_select(1, index)

    def _compute(self, first: int) -> Tensor:
        """The noise `[step, batch, width]` of several steps."""
        on = torch.device("cpu") if self._device.type in _WITHOUT_FLOAT64 else self._device
        counters = torch.arange(first * self._width, (first + self._n_at_once) * self._width, device=on)
        numbers = counters.view(self._n_at_once, 1, self._width) + 1
        bits = _mixed(numbers * _signed(_WEYL) + self._starts.to(on)[:, None])
        uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
        return uniform.log_().neg_().log_().neg_().float().to(self._device)


def stream_start(seed: int, prompt: TokenizedPrompt) -> int:
    """The start of a prompt's stream, computed from the seed, the prompt set, the prompt's id and its sample.

    The first sample has the stream of a prompt without samples.
    """
    of_sample = f"\0{prompt.sample}" if prompt.sample not in (None, 1) else ""
    name = f"{seed}\0{prompt.prompt_set}\0{prompt.id}{of_sample}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


def _mixed(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _signed(_FIRST)
    numbers = (numbers ^ _shifted(numbers, 27)) * _signed(_SECOND)
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, n_bits: int) -> Tensor:
    """Shifted right, with zeros from the left."""
    return (numbers >> n_bits) & ((1 << (64 - n_bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
