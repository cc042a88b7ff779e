"""How a trait moves within each span: its mean over a turn, and the change point of thinking and of the answer.

Definitions are those of `dynamics`, over the tokens of one span. The first token of all is left out; template tokens
have no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.prompts.spans import TokenSpan
from tlcapture.storage.rounding import PROBABILITY_DIGITS, PROJECTION_DIGITS, round_significant
from tlcapture.traits.change_points import LEVEL, SHORTEST, change_points

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
        commitments = _commitments(values, start) if span.kind in _RESPONSE else [{}] * len(trajectories)
        for row, commitment in enumerate(commitments):
            measures = {
                "mean": _rounded(values[row].mean() if values.shape[1] else None),
                "peak_velocity": _rounded(steps[row].max(initial=0.0)),
            }
            found[row].append({**span.to_json(), **measures, **commitment})
    return found


def _commitments(values: Values, start: int) -> list[dict[str, Any]]:
    if values.shape[1] < SHORTEST or np.isnan(values).any():
        return [{"commitment_point": None, "commitment_shift": None, "commitment_p": None} for _ in values]
    changes = change_points(values)
    return [
        {
            "commitment_point": start + int(index) if p <= LEVEL else None,
            "commitment_shift": _rounded(shift),
            "commitment_p": _rounded(p, PROBABILITY_DIGITS),
        }
        for index, shift, p in zip(changes.index, changes.shift, changes.p, strict=True)
    ]


def _rounded(value: float | None, digits: int = PROJECTION_DIGITS) -> float | None:
    return None if value is None or np.isnan(value) else float(round_significant(value, digits))
