"""How far a response rises above its prompt, how long it stays there, and whether that is chance. Loads no torch.

The baseline is the mean of the prompt, its first token left out. The response is smoothed over five tokens. Its peak
counts where it exceeds the baseline by more than in 95 % of block permutations: prompt and response, as one closed
ring of tokens, are cut into blocks, and the blocks are shuffled between prompt and response. Blocks keep neighbouring
tokens together, which are correlated (Künsch, "The Jackknife and the Bootstrap for General Stationary Observations",
1989; Politis and Romano, "A circular block-resampling procedure for stationary data", 1992). A dealt token keeps the
neighbours it was smoothed with, except at the edges of the response.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tlcapture.traits.statistics.change_points import Values
from tlcapture.traits.statistics.critical_values import LEVEL

DEFINITIONS = 2  # the version of what a file's dynamics mean; files that name none have the first ones
SMOOTHED = 5
BLOCK = 6
PERMUTATIONS = 199
_REACH = SMOOTHED // 2

_Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rises:
    """The rises of several trajectories, one number each.

    Attributes:
        baseline: the mean of the prompt without its first token.
        rise: the largest rise of the smoothed response above the baseline.
        peak: the response token with the largest rise.
        persistence: how many tokens from the peak on, itself counted, stay at or above half of that rise.
        p: how often a permutation rises as far: of `n` permutations, `(1 + n_as_far) / (1 + n)`.
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
    rest, n_before = _without_first(trajectories), n_prompt_tokens - 1
    response, baseline = smoothed(rest[n_before:].T).T, rest[:n_before].mean(axis=0)
    n_response = len(response)
    columns, peak = np.arange(rest.shape[1]), response.argmax(axis=0)
    rise = response[peak, columns] - baseline
    is_below = (response < baseline + rise / 2) & (np.arange(n_response)[:, None] > peak)
    end = np.where(is_below.any(axis=0), is_below.argmax(axis=0), n_response)
    null, rounding = _permuted(rest, n_response, n_permutations)[1:], _rounding(rest)
    p = (1 + (null >= rise - rounding).sum(axis=0)) / (1 + n_permutations)
    return Rises(baseline, rise, peak, end - peak, p, _strength(rise, null, rounding))


def rise_strengths(trajectories: Values, n_prompt_tokens: int, n_permutations: int) -> tuple[NDArray[np.bool_], Values]:
    """Whether each rise is larger than those of all permutations, and the `strength` of `rises`."""
    rest = _without_first(trajectories)
    found, rounding = _permuted(rest, rest.shape[0] + 1 - n_prompt_tokens, n_permutations), _rounding(rest)
    rise, null = found[0], found[1:]
    return null.max(axis=0) < rise - rounding, _strength(rise, null, rounding)


def _without_first(trajectories: Values) -> Values:
    """All tokens except the first, the attention sink, with each token's values together."""
    return np.ascontiguousarray(trajectories[:, 1:].T)


def _rounding(rest: Values) -> Values:
    """The largest rounding difference between rises of the same tokens."""
    return max(1e-9, 8 * np.finfo(rest.dtype).eps) * np.maximum(rest.max(axis=0), -rest.min(axis=0))


def _strength(rise: Values, null: Values, rounding: Values) -> Values:
    mean = null.mean(axis=0)
    apart = null - mean
    spread = np.sqrt(np.einsum("ps,ps->s", apart, apart) / len(null))
    return (rise - mean) / np.where(spread > rounding, spread, np.inf)


def peak_of(trajectory: Values, n_prompt_tokens: int) -> int | None:
    """The index of the response token where the smoothed trajectory is largest; `None` without a response."""
    response = trajectory[n_prompt_tokens:]
    return n_prompt_tokens + int(smoothed(response).argmax()) if len(response) else None


def smoothed(values: Values) -> Values:
    """Centred means over `SMOOTHED` tokens along the last axis, the first and last value repeated beyond the edges."""
    by_token = np.moveaxis(values, -1, 0)
    padded = np.concatenate([by_token[:1]] * _REACH + [by_token] + [by_token[-1:]] * _REACH)
    return np.moveaxis(_moving_sum(padded) / SMOOTHED, 0, -1)


def _moving_sum(padded: Values, pairs: Values | None = None, out: Values | None = None) -> Values:
    """Sums over `SMOOTHED` tokens along the first axis; `pairs` and `out` are buffers for the sums over two and all."""
    pairs = np.add(padded[:-1], padded[1:], out=pairs)
    total = np.add(pairs[:-3], pairs[2:-1], out=out)
    total += padded[4:]
    return total


def _permuted(rest: Values, n_response: int, n_permutations: int) -> Values:
    """Rises `[1 + n_permutations, n_trajectories]` of trajectories `[n_tokens, n_trajectories]`, as they are first."""
    dealt = _dealt(len(rest), n_response, n_permutations)
    near_edges = rest.take(dealt.near_edges.ravel(), axis=0).reshape(len(dealt.near_edges), -1)
    at_edges = dealt.edge_weights.astype(rest.dtype, copy=False) @ near_edges
    largest = at_edges.reshape(-1, 1 + n_permutations, rest.shape[1]).max(axis=0)
    if len(dealt.inner):
        np.maximum(largest, _largest_inner(rest, dealt), out=largest)
    largest -= dealt.prompt_weights.astype(rest.dtype, copy=False) @ rest
    return largest


def _largest_inner(rest: Values, dealt: _Dealt) -> Values:
    """The largest mean of the tokens that are smoothed with the neighbours they had, by permutation."""
    ring, n_series = _ring(len(rest)), rest.shape[1]
    n_sums = len(ring) - SMOOTHED + 1
    # One array for all: memory that is freed in pieces goes back to the system, and is slow to get again.
    places = np.empty((2 * len(ring) - 1 + 3 * n_sums, n_series), dtype=rest.dtype)
    padded, pairs, sums = np.split(places, [len(ring), 2 * len(ring) - 1])
    _moving_sum(rest.take(ring, axis=0, out=padded, mode="clip"), pairs, sums[:n_sums])
    # The largest sum of each 1, 2 and 4 tokens on the ring, by the first of them: two of these cover any run.
    one, two, four = np.split(sums, 3)
    np.maximum(one[:-1], one[1:], out=two[:-1])
    np.maximum(two[:-3], two[2:-1], out=four[:-3])
    runs = sums.take(dealt.begins, axis=0)
    np.maximum(runs, sums.take(dealt.ends, axis=0), out=runs)
    largest = runs.take(dealt.inner[0], axis=0)
    for row in dealt.inner[1:]:
        np.maximum(largest, runs.take(row, axis=0), out=largest)
    largest /= SMOOTHED
    return largest


@lru_cache(maxsize=64)
def _ring(n_tokens: int) -> _Places:
    """The tokens of the ring, with as many more at both ends as windows and runs that begin on it reach over."""
    return np.arange(-_REACH, n_tokens + _REACH + BLOCK - 1) % n_tokens


@dataclass(frozen=True, eq=False)
class _Dealt:
    """The tokens that each permutation deals to the response; the first permutation changes nothing.

    Attributes:
        begins, ends: `[n_runs]`, the runs of tokens that are smoothed with the neighbours they had in any permutation,
            each as the two windows that cover it.
        inner: `[n_most, 1 + n_permutations]`, the runs of each permutation; where there are fewer, its first again.
        near_edges: `[n_near, 1 + n_permutations]`, the tokens that the others are smoothed over.
        edge_weights: `[n_edges, n_near]`, which give their smoothed values.
        prompt_weights: `[1 + n_permutations, n_tokens]`, which give the mean of the tokens dealt to the prompt.
    """

    begins: _Places
    ends: _Places
    inner: _Places
    near_edges: _Places
    edge_weights: Values
    prompt_weights: Values


@lru_cache(maxsize=64)
def _dealt(n_tokens: int, n_response: int, n_permutations: int) -> _Dealt:
    drawn = _permutations(n_tokens, n_permutations, np.random.default_rng([n_tokens, n_response]))
    response = np.concatenate([np.arange(n_tokens)[None], drawn])[:, -n_response:]
    at_edge = sorted({*range(min(_REACH, n_response)), *range(max(0, n_response - _REACH), n_response)})
    window = np.clip(np.add.outer(at_edge, np.arange(-_REACH, _REACH + 1)), 0, n_response - 1)
    near = np.unique(window)
    edge_weights = (window[:, :, None] == near).mean(axis=1)
    prompt_weights = np.full((1 + n_permutations, n_tokens), 1 / (n_tokens - n_response))
    prompt_weights[np.arange(1 + n_permutations)[:, None], response] = 0
    begins, ends, inner = _runs(np.delete(response, at_edge, axis=1), n_tokens)
    return _Dealt(begins, ends, inner, response[:, near].T, edge_weights, prompt_weights)


def _permutations(n_tokens: int, n_permutations: int, generator: np.random.Generator) -> _Places:
    """The ring of tokens with its blocks permuted and the whole turned, `[n_permutations, n_tokens]`."""
    blocks = np.array_split(np.arange(n_tokens), -(-n_tokens // BLOCK))
    drawn = [(generator.permutation(len(blocks)), generator.integers(n_tokens)) for _ in range(n_permutations)]
    order, turn = np.array([each for each, _ in drawn]), np.array([each for _, each in drawn])
    sizes = np.array([len(each) for each in blocks])[order].ravel()
    first = np.array([each[0] for each in blocks])[order].ravel()
    tokens = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(n_permutations * n_tokens)
    return np.asarray((tokens.reshape(n_permutations, n_tokens) + turn[:, None]) % n_tokens)


def _runs(tokens: _Places, n_tokens: int) -> tuple[_Places, _Places, _Places]:
    """The runs of neighbours on the ring, of at most `BLOCK`: the fields `begins`, `ends` and `inner` of `_Dealt`."""
    n_rows, n_inner = tokens.shape
    if not n_inner:
        none = np.empty(0, dtype=np.int64)
        return none, none, np.empty((0, n_rows), dtype=np.int64)
    column = np.arange(n_inner)
    is_first = np.diff(tokens, axis=1, prepend=tokens[:, :1]) % n_tokens != 1
    since = column - np.maximum.accumulate(np.where(is_first, column, 0), axis=1)
    rows, columns = np.nonzero(since % BLOCK == 0)
    lengths = np.diff(rows * n_inner + columns, append=n_rows * n_inner)
    number = np.arange(len(rows)) - np.searchsorted(rows, rows)
    runs, found = np.unique(lengths * n_tokens + tokens[rows, columns], return_inverse=True)
    inner = np.repeat(found[number == 0][None], number.max() + 1, axis=0)
    inner[number, rows] = found
    lengths, first = np.divmod(runs, n_tokens)
    power = np.frexp(lengths)[1] - 1  # windows of 2**power tokens
    begins = power * (n_tokens + BLOCK - 1) + first
    return begins, begins + lengths - 2**power, inner
