"""Pictures for papers and logs, without a display: heatmaps of an evaluation, curves of steering."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
_MEASURES = {"val_effect_size": "effect size (Cohen's d)", "val_auroc": "AUROC"}


def evaluation_heatmaps(trait: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a layer-by-method heatmap of effect size and of AUROC, for each component in `rows`."""
    components = sorted({row["component"] for row in rows}, reverse=True)
    figure = _figure(width=11, height=1.2 + 1.7 * len(components))
    axes = figure.subplots(len(components), len(_MEASURES), squeeze=False)
    for line, component in zip(axes, components, strict=True):
        own = [row for row in rows if row["component"] == component]
        methods = list(dict.fromkeys(row["method"] for row in own))
        layers = sorted({row["layer"] for row in own})
        for axis, (measure, label) in zip(line, _MEASURES.items(), strict=True):
            grid = np.full((len(methods), len(layers)), np.nan)
            for row in own:
                grid[methods.index(row["method"]), layers.index(row["layer"])] = row[measure]
            image = axis.imshow(grid, aspect="auto", cmap="viridis")
            axis.set_yticks(range(len(methods)), methods)
            step = max(1, len(layers) // 10)
            axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            axis.set_title(f"{component}: {label}", fontsize=9)
            axis.set_xlabel("layer", fontsize=8)
            figure.colorbar(image, ax=axis)
    figure.suptitle(trait)
    return _png(figure)


def steering_curves(trait: str, results: Mapping[str, Any]) -> bytes:
    """A PNG of `trait_mean` and `coherence_mean` against the coefficient, one line a layer."""
    by_layer: dict[int, list[tuple[float, float, float]]] = {}
    for run in results["runs"]:
        point = (run["config"]["coefficients"][0], run["result"]["trait_mean"], run["result"]["coherence_mean"])
        by_layer.setdefault(run["config"]["layers"][0], []).append(point)
    figure = _figure(width=10, height=3.6)
    left, right = figure.subplots(1, 2)
    for axis, column, label in ((left, 1, "trait_mean"), (right, 2, "coherence_mean")):
        for layer in sorted(by_layer):
            start = (0.0, results["baseline"]["trait_mean"], results["baseline"]["coherence_mean"])
            points = sorted([start, *by_layer[layer]])
            axis.plot([p[0] for p in points], [p[column] for p in points], marker="o", label=f"layer {layer}")
        axis.set_xlabel("coefficient")
        axis.set_title(label)
        axis.set_ylim(0, 100)
    right.axhline(70, linestyle=":", color="grey")
    left.legend(fontsize=7)
    figure.suptitle(trait)
    return _png(figure)


def _figure(*, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
