"""Plotly figures of projections, logit lens and attention. They need neither files nor a model.

The first token is an attention sink whose projection can be a hundred times larger than all others. Figures of
projections exclude it from the scale and note that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import plotly.colors
import plotly.graph_objects as go
from numpy.typing import NDArray

from tlcapture.commands.plots import PERSISTS
from tlcapture.errors import InputError
from tlcapture.explore.figures.attention_heads import AttentionHeads
from tlcapture.explore.figures.logit_lens_table import LogitLensTable
from tlcapture.explore.figures.offline_figure import OfflineFigure, plotly_text
from tlcapture.explore.figures.set_means import SetLine, SetMean, mean_of
from tlcapture.text import counted, printable
from tlcapture.traits.projections.token_scores import TokenScores

_COLOURS = plotly.colors.qualitative.D3
_DASHES = ("solid", "dash", "dot", "dashdot")
CALIBRATED = "projection: negative examples at 0, positive at 1"
_MOST_LABELS = 100  # tick labels on a token axis; longer texts label every second, third, ... token


def trajectory_figure(projections: Sequence[TokenScores], *, calibrated: bool = True) -> OfflineFigure:
    """Trajectories of one capture over its tokens, one line per trait.

    A diamond marks the commitment point, the thick segment persistence (starting at the peak of the smoothed response),
    and the dashed line the start of the response. If `calibrated`, and all vectors have a calibration, the negative
    examples are at 0 and the positive ones at 1, with a dotted line halfway. Raises `InputError` if `projections` is
    empty.
    """
    if not projections:
        raise InputError("no trait to draw: name one that has vectors")
    first = projections[0]
    figure = _over_tokens(first.tokens, first.n_prompt_tokens, f"{first.prompt_set}/{first.name}")
    is_calibrated = calibrated and all(each.calibration is not None for each in projections)
    lines = [drawn_trajectory(each, calibrated=is_calibrated) for each in projections]
    for trace_index, (projection, line) in enumerate(zip(projections, lines, strict=True)):
        _add_trajectory(figure, projection, line, _COLOURS[trace_index % len(_COLOURS)])
    marks = ["dashed: the response begins", *_marks(projections)]
    if not any(np.isnan(line[0]) for line in lines):
        sinks = ", ".join(f"{line[0]:+.4g}" for line in lines[:3])
        sinks += ", ..." if len(projections) > 3 else ""
        marks.append(f"token 0, an attention sink, is off the scale: {sinks}")
    _note(figure, "; ".join(marks))
    figure.update_yaxes(title_text="projection", zeroline=True, zerolinecolor="#999999")
    if is_calibrated:
        figure.update_yaxes(title_text=CALIBRATED)
        figure.add_hline(y=0.5, line_dash="dot", line_color="#999999")
    return figure


def _marks(projections: Sequence[TokenScores]) -> list[str]:
    """The meaning of the marks that a figure of trajectories has."""
    marks = {
        "diamond: commits": any(each.commitment_point is not None for each in projections),
        PERSISTS: any(each.peak is not None for each in projections),
    }
    return [mark for mark, is_drawn in marks.items() if is_drawn]


def mean_trajectory_figure(sets: Mapping[str, Sequence[SetLine]], *, calibrated: bool = True) -> OfflineFigure:
    """Mean trajectories of many responses over the tokens, one line per trait and prompt set, with their spread.

    The responses begin together, at 0; the band is one standard deviation over responses each way. Each line has its
    own colour, and the second prompt set is dashed. A token that fewer responses have is the mean of these alone; their
    number is shown on hovering.

    Args:
        sets: the lines of each prompt set, or of a variant, `SET@VARIANT`.

    Raises `InputError` if there are none.
    """
    everything = [each for found in sets.values() for each in found]
    if not everything:
        raise InputError("no trait to draw: name one that has vectors")
    is_calibrated = calibrated and all(each.calibration is not None for each in everything)
    traits = list(dict.fromkeys(each.trait for each in everything))
    figure, is_ragged = OfflineFigure(), False
    for (trait_index, trait), (set_index, prompt_set) in product(enumerate(traits), enumerate(sets)):
        lines = [each for each in sets[prompt_set] if each.trait == trait]
        if not lines:
            continue
        label = f"{trait}, {prompt_set}" if len(sets) > 1 else trait
        over = mean_of(lines, lambda each: each.calibrated if is_calibrated else each.trajectory)
        _add_mean(
            figure,
            over,
            name=plotly_text(f"{label} ({counted(len(lines), 'response')})"),
            colour=_COLOURS[(trait_index * len(sets) + set_index) % len(_COLOURS)],
            dash=_DASHES[set_index % len(_DASHES)],
        )
        is_ragged |= bool((over.n[over.positions >= 0] < len(lines)).any())
    _lay_out(figure, f"{' beside '.join(sets)}: mean and one standard deviation over responses")
    if is_ragged:
        _note(figure, "a token that fewer responses have is their mean alone")
    figure.add_vline(x=-0.5, line_dash="dash", line_color="#555555")
    figure.update_xaxes(title_text="token, where 0 is the first of the response")
    figure.update_yaxes(
        title_text=CALIBRATED if is_calibrated else "projection", zeroline=True, zerolinecolor="#999999"
    )
    return figure


def _add_mean(figure: OfflineFigure, over: SetMean, *, name: str, colour: str, dash: str) -> None:
    """Add a mean trajectory and its spread, where at least two responses have the token."""
    drawn = ~np.isnan(over.spread)
    x, mean, spread = over.positions[drawn], over.mean[drawn], over.spread[drawn]
    figure.add_trace(
        go.Scatter(
            x=[*x, *x[::-1]],
            y=[*(mean + spread), *(mean - spread)[::-1]],
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            name=f"{name}: one standard deviation",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=mean,
            line={"color": colour, "width": 2, "dash": dash},
            name=name,
            legendgroup=name,
            hovertemplate=f"token %{{x}} of the response<br>{name}: %{{y:.5g}}, mean of %{{customdata}}<extra></extra>",
            customdata=over.n[drawn],
        )
    )


def drawn_trajectory(projection: TokenScores, *, calibrated: bool) -> NDArray[np.float64]:
    """A copy of a trajectory, on the scale of the vector's examples if `calibrated` and there is one."""
    found = projection.calibrated if calibrated else None
    return projection.trajectory.copy() if found is None else found


def layers_figure(projection: TokenScores, point: str | None = None) -> OfflineFigure:
    """A heatmap, layers by tokens, of activations projected onto one trait's vector.

    The scale is symmetric about 0; the dotted line is the vector's own layer. Cells that were not kept are blank.

    Args:
        point: a residual point; `residual_out` (or `attn_out`) by default.

    Raises `InputError` if the projection does not have that point.
    """
    by_layer = projection.by_layer(point).T
    known = np.abs(by_layer[list(projection.layers), 1:])
    limit = float(known[~np.isnan(known)].max(initial=0.0)) or 1.0
    drawn = by_layer.copy()
    drawn[:, 0] = np.nan
    title = f"{projection.prompt_set}/{projection.name}: {projection.title}, {point or projection.sublayers[-1]}"
    figure = _over_tokens(projection.tokens, projection.n_prompt_tokens, title)
    figure.add_trace(
        go.Heatmap(
            z=drawn,
            zmin=-limit,
            zmax=limit,
            colorscale="RdBu_r",
            colorbar={"title": {"text": "projection"}},
            customdata=np.broadcast_to(_hover_texts(projection.tokens), drawn.shape),
            hovertemplate="%{customdata}<br>layer %{y}: %{z:.5g}<extra></extra>",
        )
    )
    figure.add_hline(y=projection.layer, line_dash="dot", line_color="black")
    if projection.commitment_point is not None:
        figure.add_vline(x=projection.commitment_point, line_dash="dot", line_color="#2ca02c")
    commits = "" if projection.commitment_point is None else "; dotted and upright: the commitment point"
    own = f"dotted: the vector's own layer, {projection.layer}"
    _note(figure, f"token 0, an attention sink, is left out, grey; dashed: the response begins; {own}{commits}")
    figure.update_layout(plot_bgcolor="#d9d9d9")
    figure.update_yaxes(title_text="layer")
    return figure


def lens_figure(table: LogitLensTable) -> OfflineFigure:
    """A heatmap, layers by tokens, of the most likely next token, coloured by its probability."""
    texts = [[printable(cell[0]) for cell in row] for row in table.top_tokens]
    hover = [
        [_lens_hover(table, row, column) for column in range(table.n_predictions)] for row in range(table.n_layers)
    ]
    title = f"{table.prompt_set}/{table.name}: logit lens"
    figure = _over_tokens(table.tokens[:-1], table.n_prompt_tokens, title)
    figure.add_trace(
        go.Heatmap(
            x=list(table.after),
            y=None if table.layers is None else [str(layer) for layer in table.layers],
            z=table.top_probs[:, :, 0],
            zmin=0,
            zmax=1,
            colorscale="Blues",
            colorbar={"title": {"text": "probability"}},
            text=[[plotly_text(text[:8]) for text in row] for row in texts],
            texttemplate="%{text}" if table.n_predictions <= _MOST_LABELS else None,
            textfont={"size": 8},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    figure.update_yaxes(title_text="layer")
    figure.update_layout(height=max(450, 18 * table.n_layers + 180))
    return figure


def attention_figure(heads: AttentionHeads, head: SupportsIndex | None) -> OfflineFigure:
    """The attention pattern of a head, or the mean over heads (`None`); queries down, keys across; rows sum to 1."""
    pattern = (heads.patterns.mean(0) if head is None else heads.pattern(head)).astype(np.float64)
    pattern[np.triu_indices(len(pattern), 1)] = np.nan  # masked: a query cannot attend to later keys
    names = _hover_texts(heads.tokens)
    which = "mean of all heads" if head is None else f"head {index(head)}"
    title = f"{heads.prompt_set}/{heads.name}: attention, layer {heads.layer}, {which}"
    figure = _over_tokens(heads.tokens, heads.n_prompt_tokens, title)
    pairs = [[f"{query}<br>attends to {key}" for key in names] for query in names]
    figure.add_trace(
        go.Heatmap(
            z=pattern,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            colorbar={"title": {"text": "weight"}},
            customdata=pairs,
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
        )
    )
    ticks = figure.layout.xaxis
    figure.update_xaxes(title_text="attends to")
    figure.update_yaxes(
        title_text="token", autorange="reversed", tickmode="array", tickvals=ticks.tickvals, ticktext=ticks.ticktext
    )
    figure.add_hline(y=heads.n_prompt_tokens - 0.5, line_dash="dash", line_color="#555555")
    figure.update_yaxes(tickfont={"size": 9})
    figure.update_layout(height=min(1400, max(500, 11 * len(heads.tokens) + 200)))
    return figure


def _over_tokens(tokens: Sequence[str], n_prompt_tokens: int, title: str) -> OfflineFigure:
    """An empty figure whose x axis is labelled with tokens."""
    step = -(-len(tokens) // _MOST_LABELS) or 1
    ticks = list(range(0, len(tokens), step))
    figure = OfflineFigure()
    _lay_out(figure, title)
    figure.update_xaxes(
        tickmode="array",
        tickvals=ticks,
        ticktext=[plotly_text(printable(tokens[tick])) for tick in ticks],
        tickangle=-90,
        tickfont={"size": 9},
    )
    figure.add_vline(x=n_prompt_tokens - 0.5, line_dash="dash", line_color="#555555")
    return figure


def _lay_out(figure: OfflineFigure, title: str) -> None:
    figure.update_layout(
        title={"text": plotly_text(title), "font": {"size": 14}},
        template="plotly_white",
        height=450,
        margin={"t": 60, "b": 110},
        legend={"orientation": "h", "y": 1.12},
    )


def _add_trajectory(figure: OfflineFigure, projection: TokenScores, line: NDArray[np.float64], colour: str) -> None:
    scores = line.copy()
    scores[0] = np.nan
    name = plotly_text(f"{projection.trait} (layer {projection.layer})")
    common: dict[str, Any] = {
        "customdata": _hover_texts(projection.tokens),
        "hovertemplate": f"%{{customdata}}<br>{name}: %{{y:.5g}}<extra></extra>",
        "legendgroup": name,
    }
    whole = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"size": 4}}
    figure.add_trace(go.Scatter(x=np.arange(len(scores)), y=scores, name=name, **whole, **common))
    if projection.peak is not None:
        span = slice(projection.peak, projection.peak + (projection.persistence or 0))
        figure.add_trace(
            go.Scatter(
                x=np.arange(len(scores))[span],
                y=scores[span],
                mode="lines+markers",
                line={"color": colour, "width": 5},
                opacity=0.35,
                hoverinfo="skip",
                showlegend=False,
                name=f"{name}: persistence {projection.persistence}",
                legendgroup=name,
            )
        )
    if projection.commitment_point is not None and not np.isnan(scores[projection.commitment_point]):
        at = projection.commitment_point
        figure.add_trace(
            go.Scatter(
                x=[at],
                y=[scores[at]],
                mode="markers",
                marker={"symbol": "diamond", "size": 12, "color": colour, "line": {"color": "black", "width": 1}},
                name=f"{name}: commitment point",
                showlegend=False,
                hovertemplate=f"{name} commits at token {at}<extra></extra>",
                legendgroup=name,
            )
        )


def _note(figure: OfflineFigure, text: str) -> None:
    figure.add_annotation(
        text=plotly_text(text), xref="paper", yref="paper", x=0, y=1.0, yanchor="bottom", showarrow=False,
        font={"size": 10, "color": "#555555"},
    )  # fmt: skip


def _hover_texts(tokens: Sequence[str]) -> NDArray[np.object_]:
    texts = [plotly_text(f"{position} {printable(token)!r}") for position, token in enumerate(tokens)]
    return np.array(texts, dtype=object)


def _lens_hover(table: LogitLensTable, row: int, column: int) -> str:
    token = table.after[column]
    which = f"{token} {printable(table.tokens[token])!r}, layer {table.layer_numbers[row]}"
    lines = [which, *table.described(row, column)]
    return "<br>".join(map(plotly_text, lines))
