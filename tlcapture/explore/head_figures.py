"""A figure of what each head of a capture attends to on average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from tlcapture.errors import InputError
from tlcapture.explore.offline_figure import OfflineFigure, plotly_text
from tlcapture.views.head_summary import MEASURES, summarised
from tlcapture.views.saved_attention import read_attention

if TYPE_CHECKING:
    from tlcapture.explore.explorable_capture import ExplorableCapture

_UNITS = {"entropy": "nats", "distance": "tokens"}


def heads_figure(capture: ExplorableCapture, measure: str) -> OfflineFigure:
    """A heatmap, layers by heads, of a mean over the response, or over the prompt if only its attention was kept.

    Raises `InputError` for an unknown measure, and for a capture without stored attention.
    """
    if measure not in MEASURES:
        raise InputError(f"no measure {measure!r} of heads: choose one of {', '.join(MEASURES)}")
    path = capture._add_on("attention")
    if path is None:
        raise InputError("no attention of this capture is stored: capture with --attention, or add it with --replay")
    found, own = summarised(read_attention(path)), capture._captured
    unit = _UNITS.get(measure, "weight")
    figure = OfflineFigure()
    figure.add_trace(
        go.Heatmap(
            z=found.measures[measure],
            colorscale="Blues",
            colorbar={"title": {"text": f"{measure} ({unit})"}},
            hovertemplate="layer %{y}, head %{x}: %{z:.3g}<extra></extra>",
        )
    )
    over = f"mean over {found.n_queries} tokens of the {found.part}"
    title = f"{own.capture_set}/{own.name}: {measure} of every head, {over}"
    figure.update_layout(title=plotly_text(title), xaxis_title="head", yaxis_title="layer", template="plotly_white")
    return figure
