"""Selecting one of a trait's vectors.

In this order: the best coherent single-layer steering run (`coherence_mean >= 70`, the largest gain over the baseline,
if it beats the best gains of all random vectors); the largest effect size; layer 16, or if the
model has no layer 16 the layer nearest to 0.6 of its depth, with a warning. An override wins over all of them. A score
counts only for the vector it was measured on: a vector that was extracted again since has no score. Runs that subtract
a vector (a negative coefficient) do not select it: where they gain, it points away from the trait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from os.path import lexists
from typing import SupportsIndex

from tlcapture.errors import InputError
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.evaluation_files import Evaluation, EvaluationRow
from tlcapture.traits.missing_vectors import no_vector, no_vectors_by_method
from tlcapture.traits.steering_files import SteeringMonitoring, SteeringResults, SteeringRun, largest_by_chance
from tlcapture.traits.vector_files import METHODS, VectorFiles

COHERENT = 70
FALLBACK_LAYER = 16
FALLBACK_DEPTH = 0.6


@dataclass(frozen=True)
class Selection:
    """The selected vector: its layer and method, the criterion, and its score.

    `selected_by` is `steering`, `effect_size`, `fallback` or `override`; `warning` states why the selection is
    doubtful.
    """

    layer: int
    method: str
    selected_by: str
    score: float | None = None
    warning: str | None = None


def select(
    files: VectorFiles,
    component: str,
    n_layers: int,
    *,
    layer: SupportsIndex | str = "auto",
    method: str | None = None,
) -> Selection:
    """Select one of a trait's vectors of a component, for a model with `n_layers`.

    Args:
        layer: a layer, which overrides all scores, or `auto`.
        method: only vectors by this method.

    Raises:
        VectorError: no vector matches.
        InputError: `layer` is another word.
        StorageError: a file with scores is damaged.
    """
    every = files.available(component)
    available = {name: layers for name, layers in every.items() if method in (None, name)}
    if not available:
        raise no_vectors_by_method(files.layout, files.trait, component, method, [*every], METHODS)
    if not isinstance(layer, str):
        layer = index(layer)  # a NumPy integer is valid too
        best = next(_ranked(files, component, available), None) if method is None else None
        return Selection(layer, _method_at(files, component, available, layer, best), "override")
    if layer != "auto":
        raise InputError(f"layer {layer!r} is neither a number nor 'auto'")
    best = next(_ranked(files, component, available), None)
    if best is not None:
        return best
    notes = ["its scores are of earlier vectors"] if _has_earlier_scores(files, component) else []
    return _fallback(available, n_layers, notes, _what_would_choose(files, component))


def fallback_layer(n_layers: int) -> int:
    """Layer 16, or for a model without it the layer nearest to 0.6 of its depth."""
    return FALLBACK_LAYER if n_layers > FALLBACK_LAYER else round(FALLBACK_DEPTH * (n_layers - 1))


def steering_runs(files: VectorFiles) -> list[SteeringRun]:
    """The single-layer runs of a trait's steering results that were made with its present vectors.

    Raises `StorageError` for a damaged file.
    """
    return steering_results(files).single_layer_runs if lexists(files.layout.steering(files.trait)) else []


def steering_results(files: VectorFiles) -> SteeringResults:
    """A trait's steering results without what was measured on vectors that were removed or replaced since.

    Raises `StorageError` for a missing or damaged file.
    """
    found = SteeringResults.read(files.layout.steering(files.trait))
    runs = [each for each in found.runs if all(is_present(files, run) for run in found.single_layers([each]))]
    monitoring = [each for each in found.monitoring if is_present(files, each)]
    return found.model_copy(update={"runs": runs, "monitoring": monitoring})


def effect_sizes(files: VectorFiles, component: str) -> dict[tuple[str, int], float]:
    """Held-out effect sizes of a trait's present vectors, by method and layer.

    Raises `StorageError` for a damaged file.
    """
    return {
        (row.method, row.layer): row.effect_size
        for row in _all_rows(files, component)
        if row.effect_size is not None and is_current(files, row, component)
    }


def _ranked(files: VectorFiles, component: str, available: Mapping[str, list[int]]) -> Iterator[Selection]:
    """All candidates with a score, best first: coherent steering runs, or effect sizes if there are no such runs.

    If random vectors were added too, a run counts only if its gain exceeds their chance level.

    Whether a score belongs to the present vector is checked one candidate at a time, since it reads the vector.
    """
    runs = [run for run in _all_steering_runs(files) if run.component == component]
    chance = largest_by_chance(run for run in runs if not run.null or is_current(files, run, component))
    note = _no_null(files.layout) if chance is None else None
    steered = [
        (Selection(run.layer, run.method, "steering", run.delta, note), run)
        for run in runs
        if run.layer in available.get(run.method, ())
        and run.coherence_mean >= COHERENT
        and run.coefficient >= 0
        and (chance is None or run.delta > chance)
    ]
    best = next(in_order := _current(files, component, steered), None)
    if best is not None:
        yield best
        yield from in_order
        return
    rows = {(row.method, row.layer): row for row in _all_rows(files, component) if row.effect_size is not None}
    measured = [
        (Selection(layer, method, "effect_size", row.effect_size), row)
        for (method, layer), row in rows.items()
        if layer in available.get(method, ())
    ]
    yield from _current(files, component, measured)


def runner_up(files: VectorFiles, component: str, selection: Selection) -> Selection | None:
    """The best candidate with a score at another layer than the selected one."""
    candidates = _ranked(files, component, files.available(component))
    return next((each for each in candidates if each.layer != selection.layer), None)


def n_layers_of_origin(files: VectorFiles, component: str) -> int:
    """Layers of the model that a trait's vectors were extracted from; without metadata, up to their last layer.

    Raises `ValueError` for a component without vectors.
    """
    available = files.available(component)
    recorded = (files.metadata(component, method).get("num_layers") for method in available)
    return int(next(filter(None, recorded), None) or 1 + max(map(max, available.values())))


def _current(
    files: VectorFiles, component: str, scored: Iterable[tuple[Selection, SteeringRun | EvaluationRow]]
) -> Iterator[Selection]:
    """Those whose score belongs to the present vector, best first; the first one warns of a better one left out."""
    warning = None
    for selection, score in sorted(scored, key=lambda pair: pair[0].score or 0.0, reverse=True):
        if is_current(files, score, component):
            notes = [*filter(None, (selection.warning, warning))]
            yield replace(selection, warning="; ".join(notes) or None)
            warning = None
        elif warning is None:
            command = "steer" if selection.selected_by == "steering" else "evaluate"
            warning = (
                f"a higher score, of {selection.method} at layer {selection.layer}, is left out, since that vector was "
                f"replaced or damaged since: '{command_line(files.layout, command)}' scores it"
            )


def _all_steering_runs(files: VectorFiles) -> list[SteeringRun]:
    path = files.layout.steering(files.trait)
    return SteeringResults.read(path).single_layer_runs if lexists(path) else []


def _all_rows(files: VectorFiles, component: str) -> list[EvaluationRow]:
    rows = Evaluation.read(files.layout.evaluation).rows_of.get(str(files.trait), ())
    return [row for row in rows if row.component == component]


def is_current(files: VectorFiles, score: EvaluationRow | SteeringRun | SteeringMonitoring, component: str) -> bool:
    """Whether a score belongs to the present vector. Scores of other tools do not record a vector, and are trusted."""
    if score.vector_digest is None or not files.file(component, score.method, score.layer).is_file():
        return True
    return score.vector_digest == files.digest(component, score.method, score.layer)


def is_present(files: VectorFiles, score: EvaluationRow | SteeringRun | SteeringMonitoring) -> bool:
    """Whether the vector that was scored is still there; scores of other tools, which record no vector, are trusted."""
    if score.vector_digest is None:
        return True
    return files.file(score.component, score.method, score.layer).is_file() and is_current(
        files, score, score.component
    )


def _has_earlier_scores(files: VectorFiles, component: str) -> bool:
    rows, runs = _all_rows(files, component), _all_steering_runs(files)
    return not (
        all(is_current(files, row, component) for row in rows)
        and all(is_current(files, run, component) for run in runs if run.component == component)
    )


def _what_would_choose(files: VectorFiles, component: str) -> str:
    """The command whose scores would choose a layer; another one for evaluated vectors without effect sizes."""
    rows, layout = _all_rows(files, component), files.layout
    if rows and all(row.effect_size is None and is_current(files, row, component) for row in rows):
        return f"its examples give no effect size; other examples, or '{command_line(layout, 'steer')}',"
    return f"'{command_line(layout, 'evaluate')}'"


def _no_null(layout: Layout) -> str:
    """The doubt about a steering gain without random vectors beside it."""
    again = command_line(layout, "steer")
    return f"its steering gain was not compared with random vectors: run '{again}' again to add them"


def _fallback(available: Mapping[str, list[int]], n_layers: int, notes: Sequence[str], remedy: str) -> Selection:
    usual = fallback_layer(n_layers)
    layer = min({each for layers in available.values() for each in layers}, key=lambda each: (abs(each - usual), each))
    method = next(name for name, layers in available.items() if layer in layers)
    notes = list(notes)
    if usual != FALLBACK_LAYER:
        notes.append(f"the model has no layer {FALLBACK_LAYER}")
    if layer != usual:
        notes.append(f"no vector at layer {usual}")
    reason = f" ({', '.join(notes)})" if notes else ""
    warning = f"layer {layer} by default{reason}, not by steering or effect size: {remedy} would choose one"
    return Selection(layer, method, "fallback", None, warning)


def _method_at(
    files: VectorFiles, component: str, available: Mapping[str, list[int]], layer: int, best: Selection | None
) -> str:
    """The method that would be selected, if it has the layer, or the first in the order of preference that does."""
    preferred = [] if best is None else [best.method]
    for method in [*preferred, *available]:
        if layer in available[method]:
            return method
    raise no_vector(files.layout, files.trait, component, next(iter(available)), layer, files.available(component))
