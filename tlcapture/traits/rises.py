"""How far a response rises above its prompt, how long it stays there, and whether chance alone does. Loads no torch.

The baseline is the mean of the prompt, its first token left out. The response is smoothed over five tokens. Its peak
counts where it exceeds the baseline by more than in 95 % of block permutations: prompt and response, as one closed
ring of tokens, are cut into blocks, and the blocks are dealt anew to prompt and response. Blocks keep neighbouring
tokens together, which are correlated (Künsch, "The Jackknife and the Bootstrap for General Stationary Observations",
1989; Politis and Romano, "A circular block-resampling procedure for stationary data", 1992). A dealt token keeps the
neighbours it was smoothed with, except at the edges of the response.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tlcapture.traits.change_points import LEVEL, Values

DEFINITIONS = 2  # the version of what a file's dynamics mean; files that name none have the first ones
SMOOTHED = 5
BLOCK = 6
PERMUTATIONS = 199
_REACH = SMOOTHED // 2


@dataclass(frozen=True)
class Rises:
    """The rises of several trajectories, one number each.

    Attributes:
        baseline: the mean of the prompt without its first token.
        rise: how far the smoothed response rises above it at most.
        peak: the response token where it does.
        persistence: how many tokens from the peak on, itself counted, stay at or above half of that rise.
        p: how often a permutation rises as far.
        strength: the rise in standard deviations of the permutations' rises, from their mean.
    """

    baseline: Values
    rise: Values
    peak: NDArray[np.int64]
    persistence: NDArray[np.int64]
    p: Values
    strength: Values

    @property
    def is_beyond_chance(self) -> NDArray[np.bool_]:
        """Whether each rise is larger than in 95 % of permutations."""
        return self.p <= LEVEL


def rises(trajectories: Values, n_prompt_tokens: int, n_permutations: int = PERMUTATIONS) -> Rises:
    """The rises of trajectories `[n_trajectories, n_tokens]`; at least two prompt tokens and one of the response."""
    rest = trajectories[:, 1:]  # without the attention sink
    n_response = trajectories.shape[1] - n_prompt_tokens
    n_before = rest.shape[1] - n_response
    baseline = rest[:, :n_before].mean(axis=1)
    response = smoothed(rest[:, n_before:])
    rows, peak = np.arange(len(rest)), response.argmax(axis=1)
    rise = response[rows, peak] - baseline
    half = baseline + rise / 2
    is_below = (response < half[:, None]) & (np.arange(n_response) > peak[:, None])
    end = np.where(is_below.any(axis=1), is_below.argmax(axis=1), n_response)
    null = _permuted(rest, n_response, n_permutations)
    rounding = 1e-9 * np.abs(rest).max(axis=1)
    p = (1 + (null >= (rise - rounding)[:, None]).sum(axis=1)) / (1 + n_permutations)
    spread = null.std(axis=1)
    strength = (rise - null.mean(axis=1)) / np.where(spread > rounding, spread, np.inf)
    return Rises(baseline, rise, peak, end - peak, p, strength)


def peak_of(trajectory: Values, n_prompt_tokens: int) -> int | None:
    """The index of the response token where the smoothed trajectory is largest; `None` without a response."""
    response = trajectory[n_prompt_tokens:]
    return n_prompt_tokens + int(smoothed(response).argmax()) if len(response) else None


def smoothed(values: Values) -> Values:
    """Centred means over `SMOOTHED` tokens along the last axis, the first and last value repeated beyond the edges."""
    width = [(0, 0)] * (values.ndim - 1) + [(_REACH, _REACH)]
    return _moving_mean(np.pad(values, width, mode="edge"))


def _moving_mean(padded: Values) -> Values:
    n_tokens = padded.shape[-1] - SMOOTHED + 1
    total = padded[..., :n_tokens].copy()
    for offset in range(1, SMOOTHED):
        total += padded[..., offset : offset + n_tokens]
    return total / SMOOTHED


def _permuted(rest: Values, n_response: int, n_permutations: int) -> Values:
    """Rises `[n_trajectories, n_permutations]` of permuted trajectories."""
    n_series, n_tokens = rest.shape
    dealt = _dealt(n_tokens, n_response, n_permutations)
    means = _moving_mean(np.take(rest, np.arange(-_REACH, n_tokens + _REACH) % n_tokens, axis=1))
    ring = np.concatenate([means, means], axis=1)
    runs = [means]  # the largest mean of each run of 1, 2, ... BLOCK tokens on the ring, by its first token
    for length in range(1, BLOCK):
        start = length % n_tokens
        runs.append(np.maximum(runs[-1], ring[:, start : start + n_tokens]))
    runs.append(np.full_like(means, -np.inf))
    inner = np.take(np.concatenate(runs, axis=1), dealt.inner, axis=1)
    at_edges = (rest @ dealt.edge_weights).reshape(n_series, -1, n_permutations)
    return np.maximum(inner.max(axis=1), at_edges.max(axis=1)) - rest @ dealt.prompt_weights


@dataclass(frozen=True)
class _Dealt:
    """Which tokens the permutations deal to the response.

    Attributes:
        inner: `[n_runs, n_permutations]`, the runs of tokens that are smoothed with the neighbours they had, as
            `(length - 1) * n_tokens + first`; where there are fewer, one that stands for no token.
        edge_weights: `[n_tokens, n_edges * n_permutations]`, which give the smoothed values of the other tokens.
        prompt_weights: `[n_tokens, n_permutations]`, which give the mean of the tokens that are dealt to the prompt.
    """

    inner: NDArray[np.int64]
    edge_weights: Values
    prompt_weights: Values


@lru_cache(maxsize=64)
def _dealt(n_tokens: int, n_response: int, n_permutations: int) -> _Dealt:
    generator = np.random.default_rng([n_tokens, n_response])
    blocks = np.array_split(np.arange(n_tokens), -(-n_tokens // BLOCK))
    at_edge = sorted({*range(min(_REACH, n_response)), *range(max(0, n_response - _REACH), n_response)})
    window = np.clip(np.add.outer(at_edge, np.arange(-_REACH, _REACH + 1)), 0, n_response - 1)
    n_runs = len(blocks) + 1  # the ring may be cut within a block
    inner = np.full((n_runs, n_permutations), BLOCK * n_tokens)
    edge_weights = np.zeros((n_tokens, len(at_edge), n_permutations))
    prompt_weights = np.full((n_tokens, n_permutations), 1 / (n_tokens - n_response))
    for each in range(n_permutations):
        order = np.concatenate([blocks[block] for block in generator.permutation(len(blocks))])
        response = (order[-n_response:] + generator.integers(n_tokens)) % n_tokens
        prompt_weights[response, each] = 0
        np.add.at(edge_weights[:, :, each], (response[window], np.arange(len(at_edge))[:, None]), 1 / SMOOTHED)
        runs = list(_runs(np.delete(response, at_edge), n_tokens))
        inner[: len(runs), each] = [(length - 1) * n_tokens + first for first, length in runs]
    return _Dealt(inner, edge_weights.reshape(n_tokens, -1), prompt_weights)


def _runs(tokens: NDArray[np.int64], n_tokens: int) -> Iterator[tuple[int, int]]:
    """First token and length of the runs of neighbours on the ring, of at most `BLOCK` tokens."""
    ends = [*(np.flatnonzero(np.diff(tokens) % n_tokens != 1) + 1).tolist(), len(tokens)]
    for start, stop in zip([0, *ends], ends, strict=False):
        for first in range(start, stop, BLOCK):
            yield int(tokens[first]), min(BLOCK, stop - first)
