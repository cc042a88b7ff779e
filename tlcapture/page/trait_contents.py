"""The page's content for a trait: its vectors, their evaluation and steering results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from os.path import lexists
from typing import Any

from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.names import Trait
from tlcapture.page import missing
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.evaluation_files import Evaluation
from tlcapture.traits.missing_vectors import PACKAGED, has_packaged
from tlcapture.traits.selection import Selection, n_layers_of_origin, runner_up, select, steering_results
from tlcapture.traits.steering_files import largest_by_chance
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.packaged import vectors_layout
from tlcapture.views.hooks import COMPONENTS

_OF_TRAIT = ("nested_auroc", "nested_sd", "nested_effect_size", "chosen_layers", "baselines", "p", "verdict")
_OF_PAIRS = {"cosine_to_traits", "cosine_to_methods"}  # of a row, which grow with the number of traits

_Tell = Callable[[TlcaptureError], str]


def vectors_of(layout: Layout, trait: Trait, tell: _Tell) -> dict[str, Any]:
    """A trait's vectors by component with the selected one, their evaluation and steering results.

    Where an experiment of the embedded model has none, those that come with the package, from the experiment `source`.
    `tell` makes the text of an error. Raises `MissingError` if the trait has no vectors.
    """
    source = source_of(layout, trait)
    is_lent = source != layout
    files = VectorFiles(source, trait)
    components = {component: _component_vectors(files, component, tell) for component in COMPONENTS}
    components = {component: found for component, found in components.items() if found}
    if not components:
        raise missing.vectors(layout, trait)
    not_steered = {"missing": missing.own_vectors(layout, trait).to_json()}
    return {
        "trait": str(trait),
        "source": source.experiment,
        "components": components,
        "evaluation": _evaluation(source, trait, tell),
        "steering": not_steered if is_lent else _steering(layout, trait, tell),
    }


def source_of(layout: Layout, trait: Trait) -> Layout:
    """The experiment that a trait's vectors are shown from: its own, or the one that comes with the package."""
    is_lent = not layout.vectors(trait).is_dir() and has_packaged(layout, trait)
    return vectors_layout(layout.root, PACKAGED) if is_lent else layout


def cross_traits_of(layout: Layout) -> dict[str, Any]:
    """The AUROC of each trait's vector on the examples of each trait, `aurocs[vector][examples]` in order of `traits`.

    Without any where the evaluation is missing or cannot be read.
    """
    content = Evaluation(all_results=[])
    with suppress(StorageError):  # which `vectors_of` names
        content = Evaluation.read(layout.evaluation)
    matrix = content.cross_traits
    names = sorted({*matrix, *(name for row in matrix.values() for name in row)})
    return {
        "traits": names,
        "aurocs": [[matrix.get(a, {}).get(b) for b in names] for a in names],
        "by_chance": content.cross_traits_by_chance,
    }


def _component_vectors(files: VectorFiles, component: str, tell: _Tell) -> dict[str, Any] | None:
    available = files.available(component)
    if not available:
        return None
    n_layers = n_layers_of_origin(files, component)
    metadata = files.metadata(component, next(iter(available)))
    found: dict[str, Any] = {"available": available, "n_layers": n_layers, "metadata": metadata}
    try:
        chosen = select(files, component, n_layers)
        found["metadata"] = files.metadata(component, chosen.method)
        rival = runner_up(files, component, chosen)
        found |= {"selected": _selection(chosen), "runner_up": _selection(rival) if rival else None}
    except TlcaptureError as error:
        found |= {"selected": None, "problem": tell(error)}
    return found


def _selection(selection: Selection) -> dict[str, Any]:
    names = ("layer", "method", "selected_by", "score", "warning")
    return {name: getattr(selection, name) for name in names}


def _evaluation(layout: Layout, trait: Trait, tell: _Tell) -> dict[str, Any]:
    try:
        content = Evaluation.read(layout.evaluation)
    except StorageError as error:
        return {"problem": tell(error)}
    rows = [
        row.model_dump(exclude_unset=True, exclude=_OF_PAIRS)
        for row in content.rows_of.get(str(trait), ())
        if None not in (row.val_effect_size, row.val_auroc)
    ]
    if not rows:
        return {"missing": missing.evaluation(layout).to_json()}
    found = content.by_trait.get(str(trait))
    return {"rows": rows, "trait": None if found is None else found.model_dump(include={*_OF_TRAIT})}


def _steering(layout: Layout, trait: Trait, tell: _Tell) -> dict[str, Any]:
    path = layout.steering(trait)
    if not lexists(path):
        return {"missing": missing.steering(layout, trait).to_json()}
    try:
        results = steering_results(VectorFiles(layout, trait))
    except StorageError as error:
        return {"problem": tell(error)}
    names = ("layer", "method", "component", "coefficient", "trait_mean", "coherence_mean", "standard_error")
    found = results.single_layer_runs
    runs = [
        {name: getattr(run, name) for name in names}
        | {"gain": run.delta, "null": [min(run.null), run.null_p95] if run.null else None}
        for run in found
    ]
    baseline = {name: getattr(results.baseline, name) for name in ("trait_mean", "coherence_mean")}
    monitoring = [
        {"layer": each.layer, "method": each.method, "rank_correlation": each.rank_correlation, "p": each.p}
        | {"null": each.null_p95}
        for each in results.monitoring
        if each.rank_correlation is not None and each.null
    ]
    return {"baseline": baseline, "runs": runs, "chance": largest_by_chance(found), "monitoring": monitoring}
