"""Plots as PNG, drawn without a display: heatmaps of an evaluation, curves of steering, and one capture's
projection onto a trait."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tlcapture.text import counted, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tlcapture.traits.evaluation_files import EvaluationRow
    from tlcapture.traits.projections.token_scores import TokenScores
    from tlcapture.traits.steering_files import SteeringResults

_DPI = 150
_MOST_LABELS = 150  # tokens labelled along an axis; of longer sequences every second, third, ...
_LONGEST_LABEL = 14
_WIDEST = 18.0
_BOUNDARY, _COMMITMENT, _LINE = "#555555", "#2ca02c", "#1f77b4"
_FONTS = ("DejaVu Sans Mono", "DejaVu Sans")  # installed with Matplotlib
_MORE_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans", "Arial Unicode MS")
PERSISTS = "thick: persists from the peak of the smoothed response"  # how all figures mark persistence
_MEASURES = {"val_effect_size": "effect size (Hedges' g)", "val_auroc": "AUROC"}


def evaluation_heatmaps(trait: str, rows: Sequence[EvaluationRow]) -> bytes:
    """A PNG with a layer-by-method heatmap of effect size and of AUROC, for each component in `rows`."""
    components = sorted({row.component for row in rows}, reverse=True)
    figure = _figure(width=11, height=1.2 + 1.7 * len(components))
    axes = figure.subplots(len(components), len(_MEASURES), squeeze=False)
    for row_of_axes, component in zip(axes, components, strict=True):
        own = [row for row in rows if row.component == component]
        methods = list(dict.fromkeys(row.method for row in own))
        layers = sorted({row.layer for row in own})
        for axis, (measure, label) in zip(row_of_axes, _MEASURES.items(), strict=True):
            grid = np.full((len(methods), len(layers)), np.nan)
            for row in own:
                value = getattr(row, measure)
                grid[methods.index(row.method), layers.index(row.layer)] = np.nan if value is None else value
            image = axis.imshow(grid, aspect="auto", cmap="viridis")
            axis.set_yticks(range(len(methods)), [_label(method) for method in methods])
            step = max(1, len(layers) // 10)
            axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            axis.set_title(f"{_label(component)}: {label}", fontsize=9)
            axis.set_xlabel("layer", fontsize=8)
            figure.colorbar(image, ax=axis)
    figure.suptitle(trait)
    return _png(figure)


def steering_curves(trait: str, results: SteeringResults) -> bytes:
    """A PNG of gain and `coherence_mean` against the coefficient, one curve per layer.

    Bars from the smallest to the largest gain of random vectors stand at the runs that have any.
    """
    by_layer: dict[int, list[tuple[float, float, float]]] = {}
    for run in results.single_layer_runs:
        by_layer.setdefault(run.layer, []).append((run.coefficient, run.delta, run.coherence_mean))
    figure = _figure(width=10, height=3.6)
    left, right = figure.subplots(1, 2)
    for axis, column, label in ((left, 1, "gain in trait_mean"), (right, 2, "coherence_mean")):
        for layer in sorted(by_layer):
            start = (0.0, 0.0, results.baseline.coherence_mean or 100.0)
            points = sorted([start, *by_layer[layer]])
            axis.plot([p[0] for p in points], [p[column] for p in points], marker="o", label=f"layer {layer}")
        axis.set_xlabel("coefficient")
        axis.set_title(label)
    right.set_ylim(0, 100)
    right.axhline(70, linestyle=":", color="grey")
    for run in results.single_layer_runs:
        if run.null:
            left.vlines(run.coefficient, min(run.null), max(run.null), color="grey", linewidth=4, alpha=0.4)
    left.legend(fontsize=7)
    figure.suptitle(trait)
    return _png(figure)


def projection_picture(projection: TokenScores) -> bytes:
    """A PNG of one capture's projection onto one trait: the trajectory, and below it all layers, token by token.

    The first token, an attention sink whose projection can be a hundred times that of other tokens, is left out
    of both scales; a label gives its value. Tokens that were not kept are blank.
    """
    n_tokens = len(projection.tokens)
    figure = _figure(width=min(_WIDEST, max(7.0, 2.5 + 0.16 * n_tokens)), height=6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.2])
    _draw_trajectory(above, projection)
    scores = np.ma.masked_invalid(projection.by_layer().T.copy())
    scores[:, 0] = np.ma.masked
    limit = float(np.abs(np.ma.filled(scores[list(projection.layers), 1:], 0.0)).max(initial=0.0))
    image = below.imshow(
        scores, aspect="auto", cmap="RdBu_r", vmin=-(limit or 1.0), vmax=limit or 1.0, origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    below.set_facecolor("0.85")
    below.axhline(projection.layer, color="black", linewidth=0.8, linestyle=":")
    below.set_ylabel(f"layer (dotted: the vector's own, {projection.layer})", fontsize=8)
    figure.colorbar(image, ax=below, label="projection", fraction=0.03, pad=0.01)
    for axis in (above, below):
        axis.axvline(projection.n_prompt_tokens - 0.5, color=_BOUNDARY, linewidth=1, linestyle="--")
        if projection.commitment_point is not None:
            axis.axvline(projection.commitment_point, color=_COMMITMENT, linewidth=1)
    step = -(-n_tokens // _MOST_LABELS) or 1
    below.set_xticks(range(0, n_tokens, step))
    labels = [printable(token)[:_LONGEST_LABEL] for token in projection.tokens[::step]]
    for text in below.set_xticklabels(labels, rotation=90, fontsize=6, family=_families()):
        text.set_parse_math(False)  # a token may hold dollars
    below.set_xlim(-0.5, n_tokens - 0.5)
    figure.suptitle(f"{projection.prompt_set}/{projection.name}: {projection.title}", fontsize=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        return _png(figure)


@cache
def _families() -> list[str]:
    """Fonts for tokens; each character is drawn in the first font that has it."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [*_FONTS, *(name for name in _MORE_FONTS if name in installed)]


def _draw_trajectory(axis: Axes, projection: TokenScores) -> None:
    positions, calibrated = np.arange(len(projection.tokens)), projection.calibrated
    scores = projection.trajectory if calibrated is None else calibrated
    axis.plot(positions[1:], scores[1:], color=_LINE, linewidth=1.2, marker=".", markersize=3)
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.plot([], [], color=_BOUNDARY, linewidth=1, linestyle="--", label="response begins")
    if calibrated is not None:
        axis.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":", label="halfway between the examples")
    if projection.peak is not None:
        span = slice(projection.peak, projection.peak + (projection.persistence or 0))
        axis.plot(
            positions[span], scores[span], color=_LINE, linewidth=5, alpha=0.35, marker="o", markersize=4,
            label=f"{PERSISTS}: {counted(projection.persistence or 0, 'token')} from token {projection.peak}",
        )  # fmt: skip
    if projection.commitment_point is not None:
        axis.plot([], [], color=_COMMITMENT, linewidth=1, label=f"commitment point: {projection.commitment_point}")
    if not np.isnan(scores[0]):
        axis.plot([], [], " ", label=f"token 0 is an attention sink, left out of the scale: {scores[0]:+.4g}")
    axis.legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axis.set_ylabel("projection" if calibrated is None else "projection, calibrated\n(examples at 0 and 1)", fontsize=8)


def _label(name: str) -> str:
    """A name from a file as a label: shortened, and with dollar signs that do not start a formula."""
    return printable(name)[:_LONGEST_LABEL].replace("$", r"\$")


def _figure(*, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
