"""An experiment's measurements as data frames: evaluations, steering, rises, runs. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tlcapture.commands.projecting.top_traits import is_beyond, summary_of
from tlcapture.errors import StorageError, warn_user
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.evaluation_files import Evaluation, read_evaluation
from tlcapture.traits.projections.saved import no_projections
from tlcapture.traits.selection import steering_runs
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.verdicts import Doubts, layers_of
from tlcapture.views.hooks import check_component

if TYPE_CHECKING:
    from pandas import DataFrame

_EVALUATION = ("trait", "component", "method", "layer")
_VERDICTS = (
    *_EVALUATION, "nested_auroc", "nested_sd", "nested_effect_size", "layer_0", "words", "lengths", "gain", "gain_low",
    "gain_high", "p", "verdict",
)  # fmt: skip
_CARRY_OVER = (
    "dataset", *_EVALUATION, "auroc", "null_auroc_p95", "p", "layer0_auroc", "bag_of_words_auroc", "effect_size",
    "n_positive", "n_negative",
)  # fmt: skip
_STEERING = ("trait", "component", "method", "layer", "coefficient", "trait_mean", "coherence_mean", "gain")
_RUN = ("command", "status", "started", "seconds", "prompts", "skipped", "files", "bytes", "failures", "warnings")


def evaluation_frame(layout: Layout) -> DataFrame:
    """A row for each vector that `evaluate` scored, with every field of `extraction_evaluation.json`.

    Raises `StorageError` for a damaged file.
    """
    from pandas import DataFrame

    rows = [row.as_written() for row in read_evaluation(layout.evaluation)]
    first = [name for name in _EVALUATION if not rows or any(name in row for row in rows)]
    frame = DataFrame(rows, columns=None if rows else list(_EVALUATION))
    if rows and "component" not in frame:
        frame["component"] = "residual"
    return frame[[*first, *(name for name in frame.columns if name not in first)]]


def verdicts_frame(layout: Layout) -> DataFrame:
    """A row for each trait, with the nested scores that `evaluate` prints; raises `StorageError` for a damaged file."""
    from pandas import DataFrame

    rows = []
    for trait, each in Evaluation.read(layout.evaluation).by_trait.items():
        baselines = dict(each.baselines)
        found = {"layer_0": baselines.pop("layer 0", None), "words": baselines.pop("bag of words", None)}
        found["lengths"] = max((rate for rate in baselines.values() if rate is not None), default=None)
        low, high = each.gain_interval or (None, None)
        fields = {name: getattr(each, name) for name in _VERDICTS if hasattr(each, name)}
        rows.append({**fields, "trait": trait, **found, "gain_low": low, "gain_high": high})
    numbers = {name: "float64" for name in _VERDICTS if name not in (*_EVALUATION, "verdict")}
    return DataFrame(rows, columns=list(_VERDICTS)).astype(numbers)


def carry_over_frame(layout: Layout) -> DataFrame:
    """A row for each vector and dataset that `evaluate --examples` scored; raises `StorageError` for a damaged file."""
    from pandas import DataFrame

    evaluation = Evaluation.read(layout.evaluation)
    rows = [
        {"dataset": dataset, "trait": trait, **{name: getattr(row, name, None) for name in _CARRY_OVER[2:]}}
        for dataset in evaluation.carry_overs
        for trait, scored in evaluation.carry_over_to(dataset).items()
        for row in scored
    ]
    return DataFrame(rows, columns=list(_CARRY_OVER))


def steering_frame(layout: Layout) -> DataFrame:
    """A row for each single-layer steering run with a trait's present vectors.

    `null_p95` is the gain that one more random vector of the same norm exceeds in at most 5 % of cases, NaN where they
    were not measured.

    Raises `StorageError` for a damaged file.
    """
    from pandas import DataFrame

    rows = []
    for trait in layout.traits():
        for run in steering_runs(VectorFiles(layout, trait)):
            null = float("nan") if run.null_p95 is None else run.null_p95
            found = {"trait": str(trait), "gain": run.delta, "null_p95": null}
            rows.append({**found, **{name: getattr(run, name) for name in _STEERING if hasattr(run, name)}})
    return DataFrame(rows, columns=[*_STEERING, "null_p95"])


def rises_frame(layout: Layout, prompt_set: str, component: str) -> DataFrame:
    """A row for each prompt of a set and each trait that it is projected onto, with the chance level of its rise.

    Warns of projections that cannot be read. Raises `InputError` if there are none.
    """
    from pandas import DataFrame

    problems: list[StorageError] = []
    summary = summary_of(layout, prompt_set, check_component(component), on_problem=problems.append)
    for problem in problems:
        warn_user(str(problem))
    if not summary.tops:
        raise no_projections(layout, prompt_set, component)
    causes = Doubts(layout.root).by_cause(summary.vectors)
    doubts = {trait: cause for cause, traits in causes.items() for trait in traits}
    layers = layers_of(summary.vectors)
    rows = [
        {
            "prompt_id": top.prompt_id if top.own_id is None else top.own_id,
            "n_samples": None if top.samples is None else top.samples.n,
            "trait": trait,
            "layer": layers.get(trait),
            "rise": rise,
            "chance": chance,
            "stands_out": is_beyond(rise, chance),
            "doubt": doubts.get(trait),
        }
        for top in summary.tops
        for trait, rise in sorted({**top.rises, **top.unmeasured}.items())
        for chance in [None if trait in top.unmeasured else top.chance]
    ]
    return DataFrame(rows).astype({"n_samples": "Int64", "layer": "Int64", "chance": "float64"})


def runs_frame(layout: Layout) -> DataFrame:
    """A row for each run that wrote to the experiment, the earliest first; damaged records are left out."""
    from pandas import DataFrame

    return DataFrame(list(_runs(layout)), columns=["name", *_RUN, "command_line"])


def _runs(layout: Layout) -> Iterator[dict[str, Any]]:
    # Names begin with the second in which a run began; of one second, the one that ended first comes first.
    for path in sorted(
        (layout.folder / "runs").glob("*.json"), key=lambda each: (each.name[:16], each.stat().st_mtime_ns)
    ):
        with suppress(StorageError, AttributeError, TypeError):
            record = read_json(path)
            files = record.get("files") or {}
            row = {name: record.get(name) for name in _RUN}
            row |= {"files": files.get("count"), "bytes": files.get("bytes")}
            row |= {name: len(record.get(name) or ()) for name in ("failures", "warnings")}
            yield {"name": path.stem, **row, "command_line": record.get("command_line")}
