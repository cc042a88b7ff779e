"""Which of a trait's vectors to use.

In this order: the best coherent single-layer steering run (`coherence_mean >= 70`, the largest
`trait_mean` over the baseline); the largest held-out effect size; layer 16, or where the model has no
layer 16 the layer nearest to 0.6 of its depth, with a warning. An override wins over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

from tlcapture.errors import InputError, VectorError
from tlcapture.storage import read_json
from tlcapture.traits.vectors import VectorFolder

COHERENT = 70
FALLBACK_LAYER = 16
FALLBACK_DEPTH = 0.6


@dataclass(frozen=True)
class Selection:
    """The vector chosen: layer, method, by what (`steering|effect_size|fallback|override`), its score."""

    layer: int
    method: str
    selected_by: str
    score: float | None = None
    warning: str | None = None


def select(
    folder: VectorFolder,
    component: str,
    n_layers: int,
    *,
    layer: SupportsIndex | str = "auto",
    method: str | None = None,
) -> Selection:
    """Choose among the vectors of a trait and component.

    Args:
        layer: a layer, which overrides; `auto`; or `default`: the fallback without looking for scores.
        method: only vectors by this method.

    Raises:
        VectorError: there is no such vector.
    """
    available = folder.available(component)
    if method is not None:
        available = {name: layers for name, layers in available.items() if name == method}
    if not available:
        wanted = f"{component} vectors" + (f" by {method!r}" if method else "")
        raise VectorError(
            f"no {wanted} for {folder.trait} in experiment {folder.layout.experiment!r}: run 'tlcapture extract' first"
        )
    if not isinstance(layer, str):
        layer = index(layer)  # a NumPy integer counts too
        return Selection(layer, _method_at(folder, component, available, layer), "override")
    if layer not in ("auto", "default"):
        raise InputError(f"layer {layer!r} is neither a number nor 'auto'")
    if layer == "auto":
        for found in (_by_steering(folder, component, available), _by_effect_size(folder, component, available)):
            if found:
                return found
    return _fallback(folder, available, n_layers)


def fallback_layer(n_layers: int) -> int:
    """Layer 16, or the layer nearest to 0.6 of a shallower model's depth."""
    return FALLBACK_LAYER if n_layers > FALLBACK_LAYER else round(FALLBACK_DEPTH * (n_layers - 1))


def _by_steering(folder: VectorFolder, component: str, available: Mapping[str, list[int]]) -> Selection | None:
    path = folder.layout.steering(folder.trait)
    if not path.is_file():
        return None
    results = read_json(path)
    candidates: list[Selection] = []
    try:
        baseline = float(results["baseline"]["trait_mean"])
        for run in results["runs"]:
            config, result = run["config"], run["result"]
            if len(config["layers"]) != 1 or config.get("component", "residual") != component:
                continue
            layer, method = int(config["layers"][0]), str(config["methods"][0])
            if layer in available.get(method, ()) and float(result["coherence_mean"]) >= COHERENT:
                candidates.append(Selection(layer, method, "steering", float(result["trait_mean"]) - baseline))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise VectorError(f"{path}: no steering results: {type(error).__name__}: {error}") from None
    return max(candidates, key=_score, default=None)


def _by_effect_size(folder: VectorFolder, component: str, available: Mapping[str, list[int]]) -> Selection | None:
    path = folder.layout.evaluation
    if not path.is_file():
        return None
    try:
        candidates = [
            Selection(int(row["layer"]), str(row["method"]), "effect_size", float(row["val_effect_size"]))
            for row in _evaluation_rows(read_json(path), str(folder.trait), component)
            if int(row["layer"]) in available.get(str(row["method"]), ())
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise VectorError(f"{path}: no evaluation: {type(error).__name__}: {error}") from None
    return max(candidates, key=_score, default=None)


def _evaluation_rows(evaluation: Any, trait: str, component: str) -> Iterator[Mapping[str, Any]]:
    for row in evaluation["all_results"]:
        if row["trait"] == trait and row.get("component", "residual") == component:
            # A row without an effect size (or with NaN, which JSON writes as null) decides nothing.
            if row["val_effect_size"] is not None:
                yield row


def _fallback(folder: VectorFolder, available: Mapping[str, list[int]], n_layers: int) -> Selection:
    wanted = fallback_layer(n_layers)
    method = next(iter(available))
    layer = min(available[method], key=lambda there: (abs(there - wanted), there))
    notes = []
    if wanted != FALLBACK_LAYER:
        notes.append(f"the model has no layer {FALLBACK_LAYER}")
    if layer != wanted:
        notes.append(f"there is no vector at layer {wanted}")
    reason = f" ({', '.join(notes)})" if notes else ""
    warning = f"layer {layer} by default{reason}, not by steering or effect size"
    return Selection(layer, method, "fallback", None, warning)


def _method_at(folder: VectorFolder, component: str, available: Mapping[str, list[int]], layer: int) -> str:
    """The first method in the order of preference that has the layer."""
    for method, layers in available.items():
        if layer in layers:
            return method
    raise folder.missing(component, next(iter(available)), layer)


def _score(selection: Selection) -> float:
    return selection.score if selection.score is not None else float("-inf")
