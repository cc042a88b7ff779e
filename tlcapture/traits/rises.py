"""How far a response rises above its prompt, how long it stays there, and whether chance alone does. Loads no torch.

The baseline is the mean of the prompt, its first token left out. The response is smoothed over five tokens. Its peak
counts where it exceeds the baseline by more than in 95 % of block permutations: prompt and response, as one closed
ring of tokens, are cut into blocks, and the blocks are dealt anew to prompt and response. Blocks keep neighbouring
tokens together, which are correlated (Künsch, "The Jackknife and the Bootstrap for General Stationary Observations",
1989; Politis and Romano, "A circular block-resampling procedure for stationary data", 1992). A dealt token keeps the
neighbours it was smoothed with, except at the edges of the response.
"""

from __future__ import annotations

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
    n_tokens = rest.shape[1]
    dealt = _dealt(n_tokens, n_response, n_permutations)
    means = _moving_mean(np.take(rest, np.arange(-_REACH, n_tokens + _REACH) % n_tokens, axis=1))
    # The largest mean among a permutation's inner tokens is the first of them in descending order.
    order = np.argsort(-means, axis=1)
    first = np.take(dealt.inner, order, axis=1).argmax(axis=2).T
    largest = np.take_along_axis(np.take_along_axis(means, order, axis=1), first, axis=1)
    largest = np.where(dealt.inner.any(axis=1), largest, -np.inf)
    at_edges = (rest @ dealt.edge_weights).reshape(len(rest), -1, n_permutations).max(axis=1)
    largest = np.maximum(largest, at_edges)
    return largest - rest @ dealt.prompt_weights


@dataclass(frozen=True)
class _Dealt:
    """Which tokens the permutations deal to the response.

    `inner` `[n_permutations, n_tokens]` are those that are smoothed with the neighbours they had; `edge_weights`
    `[n_tokens, n_edges * n_permutations]` gives the smoothed values of the others, and `prompt_weights` `[n_tokens,
    n_permutations]` the mean of the tokens that are dealt to the prompt.
    """

    inner: NDArray[np.bool_]
    edge_weights: Values
    prompt_weights: Values


@lru_cache(maxsize=64)
def _dealt(n_tokens: int, n_response: int, n_permutations: int) -> _Dealt:
    generator = np.random.default_rng([n_tokens, n_response])
    blocks = np.array_split(np.arange(n_tokens), -(-n_tokens // BLOCK))
    responses = np.empty((n_permutations, n_response), dtype=np.int64)
    for row in responses:
        order = np.concatenate([blocks[each] for each in generator.permutation(len(blocks))])
        row[:] = (order[-n_response:] + generator.integers(n_tokens)) % n_tokens
    inner = np.zeros((n_permutations, n_tokens), dtype=bool)
    np.put_along_axis(inner, responses, values=True, axis=1)
    weights = ~inner.T / (n_tokens - n_response)
    at_edge = np.unique([*range(min(_REACH, n_response)), *range(max(0, n_response - _REACH), n_response)])
    np.put_along_axis(inner, responses[:, at_edge], values=False, axis=1)
    window = np.arange(-_REACH, _REACH + 1)
    edges = responses[:, np.clip(at_edge[:, None] + window, 0, n_response - 1)]
    edge_weights = np.zeros((n_tokens, len(at_edge), n_permutations))
    rows, columns = np.arange(n_permutations)[:, None, None], np.arange(len(at_edge))[:, None]
    np.add.at(edge_weights, (edges, columns, rows), 1 / SMOOTHED)
    return _Dealt(inner, edge_weights.reshape(n_tokens, -1), weights)
