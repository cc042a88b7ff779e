"""`tlcapture project`: saved captures onto trait vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcapture.captures import Capture
from tlcapture.errors import InputError, StorageError
from tlcapture.layout import Layout
from tlcapture.runs.alone import alone
from tlcapture.runs.report import Reporter, RunReport
from tlcapture.runs.shards import Shard
from tlcapture.runs.vectors import Chooser, VectorChoice, project_capture, traits_to_project
from tlcapture.storage import read_json, write_json
from tlcapture.traits.projection import dynamics_of_file


@dataclass(frozen=True)
class ProjectOptions:
    """What to project onto, of which component; `dynamics_only` computes dynamics again and nothing else.

    `shard` is taken of the captures that there are when the run begins.
    """

    vectors: VectorChoice = VectorChoice()
    component: str = "residual"
    dynamics_only: bool = False
    skip_existing: bool = False
    shard: Shard | None = None


def run_project(
    layout: Layout, prompt_sets: Sequence[str], options: ProjectOptions, reporter: Reporter = Reporter()
) -> RunReport:
    """Project all captures of prompt sets.

    Raises:
        InputError: there is no such experiment, prompt set, capture or vector; nothing was written.
    """
    if not layout.folder.is_dir():
        raise InputError(f"no experiment {layout.experiment!r}: expected the folder {layout.folder}")
    of_set = layout.prompt_ids if options.dynamics_only else layout.captured
    ids = {name: _there(layout, name, of_set(name)) for name in prompt_sets}
    if options.shard is not None:
        ids = {name: list(options.shard.of(found)) for name, found in ids.items()}
    report = reporter.report(layout)
    if options.dynamics_only:
        for name in prompt_sets:
            with alone(layout, f"captures of {name}", reporter, options.shard, "projection"):
                _recompute_dynamics(layout, name, ids[name], options, report, reporter)
        return report
    if not traits_to_project(layout, options.vectors):
        raise InputError(f"experiment {layout.experiment!r} has no trait vectors: run 'tlcapture extract' first")
    chooser = Chooser(layout, options.vectors, report, reporter)
    for name in prompt_sets:
        with (
            alone(layout, f"captures of {name}", reporter, options.shard, "projection"),
            reporter.progress(len(ids[name]), name, "prompt") as progress,
        ):
            for prompt_id in ids[name]:
                with report.attempt(f"{name}/{prompt_id}"):
                    _project_one(layout, name, prompt_id, options, chooser, report, reporter)
                progress.advance(1)
    return report


def _there(layout: Layout, prompt_set: str, ids: list[str]) -> list[str]:
    if not ids and layout.prompt_ids(prompt_set):
        raise InputError(
            f"of prompt set {prompt_set!r} only projections were kept (--projections-only), which cannot be projected: "
            "capture it again"
        )
    if not ids:
        there = ", ".join(layout.captured_prompt_sets()) or "none"
        raise InputError(
            f"experiment {layout.experiment!r} has no captures of prompt set {prompt_set!r}; captured sets: {there}"
        )
    return ids


def _project_one(
    layout: Layout,
    prompt_set: str,
    prompt_id: str,
    options: ProjectOptions,
    chooser: Chooser,
    report: RunReport,
    reporter: Reporter,
) -> None:
    raw = layout.residual(prompt_set, prompt_id)
    capture = Capture.open(raw)
    if capture.prompt_set != prompt_set or capture.prompt_id != prompt_id:
        raise StorageError(f"{raw}: it says it is {capture.prompt_set}/{capture.prompt_id}: it was moved or renamed")
    choose = chooser.missing if options.skip_existing else chooser.vectors
    vectors = choose(capture, options.component)
    if not vectors:
        report.n_skipped += options.skip_existing
        return
    intended = options.vectors.experiment is not None
    project_capture(layout, capture, vectors, report, reporter, other_model_intended=intended)
    report.n_prompts += 1


def _recompute_dynamics(
    layout: Layout,
    prompt_set: str,
    ids: Sequence[str],
    options: ProjectOptions,
    report: RunReport,
    reporter: Reporter,
) -> None:
    """Read projection files and write them back with new dynamics, all else as it is."""
    with reporter.progress(len(ids), prompt_set, "prompt") as progress:
        for prompt_id in ids:
            name = f"{prompt_set}/{prompt_id}"
            paths = [
                path for path in layout.all_projections(prompt_set, prompt_id) if _is_wanted(layout, path, options)
            ]
            if not paths:
                report.failed(name, "has no projection whose dynamics could be computed again")
                continue
            for path in paths:
                with report.attempt(name):
                    content = read_json(path)
                    content["dynamics"] = _dynamics(path, content)
                    report.wrote(write_json(path, content))
            report.n_prompts += 1
            progress.advance(1)


def _is_wanted(layout: Layout, path: Path, options: ProjectOptions) -> bool:
    trait, component = layout.of_projection(path)
    return component == options.component and (not options.vectors.traits or trait in options.vectors.traits)


def _dynamics(path: Path, content: Any) -> dict[str, Any]:
    try:
        return dynamics_of_file(content).to_json()
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
