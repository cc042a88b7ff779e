"""Pictures of our Plotly figures by Matplotlib, which needs no browser: lines, bands, markers and heatmaps."""

from __future__ import annotations

import io
import warnings
from html import unescape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110
_INCH = 96  # pixels of a figure
_NARROWEST, _MARGINS, _OF_LABEL = 1000 / _INCH, 1.5, 0.125  # inches: a label of six points needs an eighth
_MOST_MARKED = 60  # points that have markers of the usual size; more have smaller ones
_LONGEST_LABEL = 14
_SYMBOLS = {"diamond": "D", "circle": "o"}
_DASHES = {"dash": "--", "dot": ":", "dashdot": "-.", None: "-", "solid": "-"}


def picture(figure: go.Figure, form: str) -> bytes:
    """A figure as `png` or `svg`. Its traces are scatters and heatmaps, its shapes lines across it."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        drawn(figure).savefig(data, format=form, dpi=_DPI, metadata={"Date": None} if form == "svg" else None)
    return data.getvalue()


def drawn(figure: go.Figure) -> Figure:
    """The figure drawn by Matplotlib, wide enough for the labels of its tokens."""
    from matplotlib.figure import Figure

    layout = figure.layout
    n_labels = len(layout.xaxis.ticktext or ())
    width = max(_NARROWEST, _MARGINS + _OF_LABEL * n_labels)
    canvas = Figure(figsize=(width, float(layout.height or 450) / _INCH), layout="constrained")
    axis = canvas.subplots()
    if layout.plot_bgcolor:
        axis.set_facecolor(layout.plot_bgcolor)
    for trace in map(_with_arrays, figure.data):
        draw = _draw_heatmap if trace.get("type") == "heatmap" else _draw_scatter
        draw(axis, trace)
    for shape in layout.shapes:
        _draw_line(axis, shape)
    _label(axis, figure)
    if axis.get_legend_handles_labels()[1]:
        canvas.legend(fontsize=7, loc="outside lower left", ncols=3, frameon=False)
    return canvas


def _with_arrays(trace: Any) -> dict[str, Any]:
    """A trace as a dict, its numbers as arrays rather than as Plotly encodes them."""
    return {**trace.to_plotly_json(), **{name: trace[name] for name in ("x", "y", "z") if name in trace}}


def _draw_scatter(axis: Axes, trace: dict[str, Any]) -> None:
    x, y = (np.asarray(trace.get(name, ()), dtype=float) for name in ("x", "y"))
    line, marker = trace.get("line") or {}, trace.get("marker") or {}
    if trace.get("fill") == "toself":
        axis.fill(x, y, color=trace.get("fillcolor"), alpha=trace.get("opacity", 1), linewidth=0)
        return
    has_markers = "markers" in (trace.get("mode") or "")
    axis.plot(
        x,
        y,
        color=line.get("color") or marker.get("color"),
        linestyle=_DASHES.get(line.get("dash"), "-"),
        linewidth=line.get("width", 1.5) if "lines" in (trace.get("mode") or "lines") else 0,
        marker=_SYMBOLS.get(str(marker.get("symbol")), "o") if has_markers else None,
        markersize=marker.get("size", 4) * min(1, _MOST_MARKED / max(1, len(x))),
        alpha=trace.get("opacity", 1),
        label=None if trace.get("showlegend") is False else _plain(trace.get("name")),
    )


def _draw_heatmap(axis: Axes, trace: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(np.asarray(trace["z"], dtype=float))
    if not values.size:  # such as the predictions after the last token
        return
    x = trace.get("x")
    first = 0.0 if x is None or not len(x) else float(x[0])
    image = axis.imshow(
        values,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        vmin=trace.get("zmin"),
        vmax=trace.get("zmax"),
        cmap=_colours(trace.get("colorscale")),
        extent=(first - 0.5, first + values.shape[1] - 0.5, -0.5, values.shape[0] - 0.5),
    )
    if trace.get("texttemplate"):
        _write_cells(axis, trace["text"], values, first)
    title = ((trace.get("colorbar") or {}).get("title") or {}).get("text", "")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure = axis.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axis, label=title, fraction=0.03, pad=0.01)


def _write_cells(axis: Axes, texts: Any, values: Any, first: float) -> None:
    """The text of each cell, light on dark ones."""
    dark = np.asarray(values.filled(0)) > (values.max() + values.min()) / 2
    for row, column in np.argwhere(~np.ma.getmaskarray(values)):
        text = _plain(texts[row][column])
        colour = "white" if dark[row, column] else "black"
        where: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True, "parse_math": False}
        axis.text(first + column, row, text, fontsize=4, color=colour, **where)


def _colours(scale: Any) -> Any:
    """A Plotly colour scale, which Plotly keeps as a list of colours."""
    if scale is None:
        return "viridis"
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("scale", [(float(at), _rgb(colour)) for at, colour in scale])


def _rgb(colour: str) -> Any:
    if not colour.startswith("rgb("):
        return colour
    return tuple(float(part) / 255 for part in colour[4:-1].split(","))


def _draw_line(axis: Axes, shape: Any) -> None:
    style: dict[str, Any] = {
        "color": shape.line.color or "black",
        "linestyle": _DASHES.get(shape.line.dash, "-"),
        "linewidth": 1,
    }
    if shape.x0 == shape.x1:
        axis.axvline(float(shape.x0), **style)
    else:
        axis.axhline(float(shape.y0), **style)


def _label(axis: Axes, figure: go.Figure) -> None:
    layout = figure.layout
    axis.set_title(_plain(layout.title.text), fontsize=10, loc="left", pad=16)
    axis.tick_params(labelsize=7)
    for own, set_ticks, set_label in (
        (layout.xaxis, axis.set_xticks, axis.set_xlabel),
        (layout.yaxis, axis.set_yticks, axis.set_ylabel),
    ):
        if own.title.text:
            set_label(_plain(own.title.text), fontsize=8)
        if own.tickvals is not None and own.ticktext is not None:
            rotation = 90 if own is layout.xaxis else 0
            set_ticks(own.tickvals, [_plain(each)[:_LONGEST_LABEL] for each in own.ticktext])
            axis.tick_params(axis="x" if own is layout.xaxis else "y", labelrotation=rotation, labelsize=6)
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels(), axis.title):
        text.set_parse_math(False)  # a token may hold dollars
    if layout.yaxis.autorange == "reversed":
        axis.invert_yaxis()
    for note in layout.annotations:
        if note.text:
            axis.annotate(_plain(note.text), (0, 1.01), xycoords="axes fraction", fontsize=6, va="bottom", color="0.4")


def _plain(text: Any) -> str:
    """A text that was escaped for Plotly."""
    return unescape(str(text or ""))
