"""Figures for a notebook or a browser, from plain data: Plotly, without a file and without a model.

The first token is an attention sink, whose projection can be a hundred times all others: it is left off
the scale of every figure of projections, which says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import plotly.colors
import plotly.graph_objects as go
from numpy.typing import NDArray

from tlcapture.errors import InputError
from tlcapture.explore.attention_heads import AttentionHeads
from tlcapture.explore.offline_figure import OfflineFigure, plotly_text
from tlcapture.explore.prediction_table import PredictionTable
from tlcapture.text import printable
from tlcapture.traits.token_scores import TokenScores

_COLOURS = plotly.colors.qualitative.D3
_MOST_LABELS = 80  # tokens written along an axis; of more, every second, third, ...


def trajectory_figure(lines: Sequence[TokenScores]) -> OfflineFigure:
    """Trajectories of one capture over its tokens, one line a trait.

    A diamond is the commitment point, the thick part persistence (from the peak of `|s|` on), the dashed
    line where the response begins. Raises `InputError` where there is no line.
    """
    if not lines:
        raise InputError("no trait to draw: name one that has vectors")
    first = lines[0]
    figure = _over_tokens(first.tokens, first.n_prompt_tokens, f"{first.prompt_set}/{first.prompt_id}")
    for number, line in enumerate(lines):
        _add_trajectory(figure, line, _COLOURS[number % len(_COLOURS)])
    sinks = ", ".join(f"{line.trajectory[0]:+.4g}" for line in lines[:3]) + (", ..." if len(lines) > 3 else "")
    _note(figure, f"token 0, an attention sink, is left off the scale: {sinks}")
    figure.update_yaxes(title_text="projection", zeroline=True, zerolinecolor="#999999")
    return figure


def layers_figure(line: TokenScores, point: str | None = None) -> OfflineFigure:
    """A heatmap, layer by token, of activations projected onto one trait's vector.

    The scale is symmetric about 0; the dotted line is the vector's own layer.

    Args:
        point: a residual point; `residual_out` (or `attn_out`) unless given.
    """
    by_layer = line.by_layer(point).T
    limit = float(np.abs(by_layer[list(line.layers), 1:]).max(initial=0.0)) or 1.0  # others were not kept
    drawn = by_layer.copy()
    drawn[:, 0] = np.nan
    title = f"{line.prompt_set}/{line.prompt_id}: {line.title}, {point or line.sublayers[-1]}"
    figure = _over_tokens(line.tokens, line.n_prompt_tokens, title)
    figure.add_trace(
        go.Heatmap(
            z=drawn,
            zmin=-limit,
            zmax=limit,
            colorscale="RdBu_r",
            colorbar={"title": {"text": "projection"}},
            customdata=np.broadcast_to(_hover_texts(line.tokens), drawn.shape),
            hovertemplate="%{customdata}<br>layer %{y}: %{z:.5g}<extra></extra>",
        )
    )
    figure.add_hline(y=line.layer, line_dash="dot", line_color="black")
    if line.commitment_point is not None:
        figure.add_vline(x=line.commitment_point, line_dash="dot", line_color="#2ca02c")
    _note(figure, "token 0, an attention sink, is left out; dotted: the vector's own layer, the commitment point")
    figure.update_yaxes(title_text="layer")
    return figure


def lens_figure(table: PredictionTable) -> OfflineFigure:
    """What each layer would predict next: the likeliest token in each cell, coloured by its probability."""
    texts = [[printable(cell[0]) for cell in row] for row in table.top_tokens]
    hover = [
        [_lens_hover(table, layer, place) for place in range(table.n_predictions)] for layer in range(table.n_layers)
    ]
    title = f"{table.prompt_set}/{table.prompt_id}: logit lens"
    figure = _over_tokens(table.tokens[: table.n_predictions], table.n_prompt_tokens, title)
    figure.add_trace(
        go.Heatmap(
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


def attention_figure(heads: AttentionHeads, head: SupportsIndex) -> OfflineFigure:
    """One head's pattern: how much each token (down) looks at each before it (across), rows summing to 1."""
    pattern = heads.pattern(head).astype(np.float64)
    pattern[np.triu_indices(len(pattern), 1)] = np.nan  # what comes later cannot be seen
    names = _hover_texts(heads.tokens)
    title = f"{heads.prompt_set}/{heads.prompt_id}: attention, layer {heads.layer}, head {index(head)}"
    figure = _over_tokens(heads.tokens, heads.n_prompt_tokens, title)
    pairs = [[f"{looking}<br>at {seen}" for seen in names] for looking in names]
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
    figure.update_xaxes(title_text="looks at")
    figure.update_yaxes(
        title_text="token", autorange="reversed", tickmode="array", tickvals=ticks.tickvals, ticktext=ticks.ticktext
    )
    figure.add_hline(y=heads.n_prompt_tokens - 0.5, line_dash="dash", line_color="#555555")
    figure.update_yaxes(tickfont={"size": 9})
    figure.update_layout(height=min(1400, max(500, 11 * len(heads.tokens) + 200)))
    return figure


def _over_tokens(tokens: Sequence[str], n_prompt_tokens: int, title: str) -> OfflineFigure:
    """An empty figure whose x axis is a line of tokens."""
    step = -(-len(tokens) // _MOST_LABELS) or 1
    places = list(range(0, len(tokens), step))
    figure = OfflineFigure()
    figure.update_layout(
        title={"text": plotly_text(title), "font": {"size": 14}},
        template="plotly_white",
        height=450,
        margin={"t": 60, "b": 110},
        legend={"orientation": "h", "y": 1.12},
    )
    figure.update_xaxes(
        tickmode="array",
        tickvals=places,
        ticktext=[plotly_text(printable(tokens[place])) for place in places],
        tickangle=-90,
        tickfont={"size": 9},
    )
    figure.add_vline(x=n_prompt_tokens - 0.5, line_dash="dash", line_color="#555555")
    return figure


def _add_trajectory(figure: OfflineFigure, line: TokenScores, colour: str) -> None:
    scores: NDArray[np.float64] = line.trajectory.copy()
    scores[0] = np.nan
    name = plotly_text(f"{line.trait} (layer {line.layer})")
    common: dict[str, Any] = {
        "customdata": _hover_texts(line.tokens),
        "hovertemplate": f"%{{customdata}}<br>{name}: %{{y:.5g}}<extra></extra>",
        "legendgroup": name,
    }
    whole = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"size": 4}}
    figure.add_trace(go.Scatter(x=np.arange(len(scores)), y=scores, name=name, **whole, **common))
    if line.peak is not None:
        span = slice(line.peak, line.peak + line.persistence + 1)
        figure.add_trace(
            go.Scatter(
                x=np.arange(len(scores))[span],
                y=scores[span],
                mode="lines+markers",
                line={"color": colour, "width": 5},
                opacity=0.35,
                hoverinfo="skip",
                showlegend=False,
                name=f"{name}: persistence {line.persistence}",
                legendgroup=name,
            )
        )
    if line.commitment_point is not None:
        at = line.commitment_point
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
    texts = [plotly_text(f"{place} {printable(token)!r}") for place, token in enumerate(tokens)]
    return np.array(texts, dtype=object)


def _lens_hover(table: PredictionTable, layer: int, place: int) -> str:
    lines = [f"{place} {printable(table.tokens[place])!r}, layer {layer}"]
    top = list(zip(table.top_tokens[layer][place], table.top_probs[layer, place], strict=True))[:5]
    lines += [f"{prob:.4g} {printable(token)!r}" for token, prob in top]
    rank, prob = table.actual_rank[layer, place], table.actual_prob[layer, place]
    lines.append(f"came: {printable(table.tokens[place + 1])!r}, rank {rank}, {prob:.4g}")
    return "<br>".join(map(plotly_text, lines))
