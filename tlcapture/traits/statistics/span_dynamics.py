"""How a trait moves within each span: its mean over a turn, and the change point of thinking and of the answer.

Definitions are those of `dynamics`, over the tokens of one span. The very first token is left out; template tokens
have no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.prompts.spans import TokenSpan
from tlcapture.storage.rounding import PROBABILITY_DIGITS, PROJECTION_DIGITS, round_significant
from tlcapture.traits.statistics.change_points import SHORTEST, change_points
from tlcapture.traits.statistics.critical_values import LEVEL

Values = NDArray[np.float64]
_RESPONSE = ("thinking", "answer")


def by_span(trajectories: Values, spans: Sequence[TokenSpan]) -> list[list[dict[str, Any]]]:
    """The key `by_span` of the dynamics of each trajectory, `[n_trajectories, n_tokens]`.

    An entry has the `kind`, `role`, `start` and `stop` of its span, `mean` over its tokens, and `peak_velocity`, the
    largest `|s[t+1] - s[t]|` of a step into it or within it. Those of `thinking` and `answer` have a `commitment_point`
    (an index over prompt and response), `commitment_shift` and `commitment_p` of their own. Null where a number needs a
    token that has no score; a mean and a commitment also where there are too few tokens.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in trajectories]
    for span in spans:
        if span.found is None or span.kind == "template":
            continue
        start, stop = max(1, span.found[0]), span.found[1]
        values = trajectories[:, start:stop]
        steps = np.abs(np.diff(trajectories[:, max(1, start - 1) : stop], axis=1))
        means = values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)
        peaks = steps.max(axis=1, initial=0.0)
        commitments = _commitments(values, start) if span.kind in _RESPONSE else [{}] * len(trajectories)
        described = span.to_json()
        measures = zip(found, _rounded(means), _rounded(peaks), commitments, strict=True)
        for entries, mean, peak, commitment in measures:
            entries.append({**described, "mean": mean, "peak_velocity": peak, **commitment})
    return found


def _commitments(values: Values, start: int) -> list[dict[str, Any]]:
    if values.shape[1] < SHORTEST or np.isnan(values).any():
        return [{"commitment_point": None, "commitment_shift": None, "commitment_p": None} for _ in values]
    changes = change_points(values)
    rounded = (changes.index, changes.p, _rounded(changes.shift), _rounded(changes.p, PROBABILITY_DIGITS))
    return [
        {
            "commitment_point": start + int(index) if p <= LEVEL else None,
            "commitment_shift": shift,
            "commitment_p": rounded_p,
        }
        for index, p, shift, rounded_p in zip(*rounded, strict=True)
    ]


def _rounded(values: NDArray[np.floating[Any]], digits: int = PROJECTION_DIGITS) -> list[float | None]:
    """Rounded for JSON, with null in place of NaN."""
    is_missing = np.isnan(values)
    rounded = round_significant(np.where(is_missing, 0.0, values), digits).tolist()
    return [None if missing else number for missing, number in zip(is_missing, rounded, strict=True)]
