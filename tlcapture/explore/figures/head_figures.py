"""What each head of a capture attends to on average: a data frame, and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from tlcapture.errors import InputError
from tlcapture.explore.figures.offline_figure import OfflineFigure, plotly_text
from tlcapture.views.head_summary import MEASURES, HeadSummary, summarised

if TYPE_CHECKING:
    from pandas import DataFrame

    from tlcapture.explore.explorable_capture import ExplorableCapture

_NAMES = {
    "entropy": "entropy (nats)",
    "distance": "distance looked back (tokens)",
    "first": "weight on the first token",
    "previous": "weight on the previous token",
    "self": "weight on the token itself",
}
_WEIGHTS = ("first", "previous", "self")


def heads_frame(capture: ExplorableCapture) -> DataFrame:
    """A row for each layer with attention and each head; raises `InputError` without stored or captured attention."""
    from pandas import DataFrame

    found, own = _summary(capture), capture._captured
    by_name = found.measures
    layers, heads = np.nonzero(~np.isnan(by_name["first"]))
    labels = {"prompt_id": own.prompt_id, "sample": own.sample, "part": found.part, "n_queries": found.n_queries}
    columns = {name: [label] * len(layers) for name, label in labels.items()}
    measures = {name: values[layers, heads] for name, values in by_name.items()}
    return DataFrame({**columns, "layer": layers, "head": heads, **measures}).astype({"sample": "Int64"})


def heads_figure(capture: ExplorableCapture, measure: str) -> OfflineFigure:
    """A heatmap, layers by heads, of a mean over the response, or over the prompt if only its attention is there.

    Raises `InputError` for an unknown measure, and without stored or captured attention.
    """
    if measure not in MEASURES:
        raise InputError(f"no measure {measure!r} of heads: choose one of {', '.join(MEASURES)}")
    found, own = _summary(capture), capture._captured
    figure = OfflineFigure()
    figure.add_trace(
        go.Heatmap(
            z=found.measures[measure],
            zmin=0,
            zmax=1 if measure in _WEIGHTS else None,
            colorscale="Blues",
            colorbar={"title": {"text": _NAMES[measure]}},
            hovertemplate="layer %{y}, head %{x}: %{z:.3g}<extra></extra>",
        )
    )
    over = f"mean over {found.n_queries} tokens of the {found.part}"
    title = f"{own.capture_set}/{own.name}: {_NAMES[measure]} of each head, {over}"
    figure.update_layout(title=plotly_text(title), xaxis_title="head", yaxis_title="layer", template="plotly_white")
    return figure


def _summary(capture: ExplorableCapture) -> HeadSummary:
    """The means over queries of the stored attention, or of the attention that a live capture has."""
    stored = capture._stored_attention()
    if stored is None:
        raise InputError(
            "this capture has no attention: capture with --attention, in Python with attention=True; "
            "'tlcapture capture --replay --attention' adds it to a stored one"
        )
    return summarised(stored)
