"""The summary at the end of a run: for each prompt, the trait that rose most, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from tlcapture.cli.output.answers import show_answers, show_without_rises
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.tables import Cell, Column
from tlcapture.errors import StorageError
from tlcapture.names import Trait, split_name
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.text import counted

if TYPE_CHECKING:
    from tlcapture.commands.projecting.top_traits import Summary, TopTrait
    from tlcapture.names import PromptId
    from tlcapture.runs.report import RunReport
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.verdicts import UsedVector

_MOST_SHOWN = 200  # largest number of prompts whose projections are read at the end of a run


def show_top_traits(
    console: Console,
    layout: Layout,
    prompt_set: str,
    component: str,
    report: RunReport,
    given: Sequence[PromptId] = (),
) -> None:
    """Print, for each prompt, the trait that rose more than chance, where it committed, and the response.

    Below the table, print how many projections commit and persist, compared with random directions. For a large set,
    print only how to view it; for one that is not projected, print the responses. Files that the `report` of the run
    knows are not read again. If prompts were `given` as text, only they are shown, each with its whole answer.
    """
    from tlcapture.commands.projecting.saved_summaries import summary_of_run

    names = layout.prompt_ids(prompt_set)
    n_prompts = len({split_name(name)[0] for name in names})
    if len(names) > _MOST_SHOWN:
        look = f"view them with '{command_line(layout, 'view')}'"
        console.line(f"{prompt_set}: {n_prompts} prompts are too many to list; {look}")
        if given:
            show_answers(console, layout, prompt_set, given, [])
        return
    summary = summary_of_run(layout, prompt_set, component, report.projected, report.seen)
    tops = [top for top in summary.tops if not given or top.prompt_id in set(map(str, given))]
    if tops:
        _show_tops(console, layout, prompt_set, replace(summary, tops=tops), with_responses=not given)
    elif given:
        console.line()
    if given:
        show_answers(console, layout, prompt_set, given, tops)
    elif not tops:
        show_without_rises(console, layout, prompt_set, names, is_projected=bool(summary.vectors))


def _show_tops(console: Console, layout: Layout, prompt_set: str, summary: Summary, *, with_responses: bool) -> None:
    console.line()
    has_chance = any(top.chance is not None for top in summary.tops)
    layers = {each.layer for each in summary.vectors}
    at = f" at layer {min(layers)}" if len(layers) == 1 else ""
    console.line(f"{prompt_set}: the trait that rose most{at}, against {summary.against}")
    console.line()
    columns = [Column("prompt", right=True), Column("trait"), Column("rise", right=True), Column("chance", right=True)]
    columns += [Column("calibrated", right=True), Column("response" if with_responses else "")]
    console.table(columns, [_row(top, with_response=with_responses) for top in summary.tops])
    console.line()
    for line in [*_notes(layout, summary, has_chance=has_chance), *_doubts(layout, summary), ""]:
        console.line(line)


def _row(top: TopTrait, *, with_response: bool) -> tuple[Cell, ...]:
    trait = top.trait if top.stands_out else "none stands out" if top.chance is not None else f"{top.trait} (?)"
    chance = "unknown" if top.chance is None else f"{top.chance:.1f} sd"
    shown = top.stands_out or top.chance is None
    calibrated = "" if top.calibrated is None or not shown else f"{top.calibrated:.2f}"
    commits = "" if top.token is None or not shown else f"commits at token {top.commitment_point}: {top.token!r}"
    rise, prompt, over = f"{top.rise:+.1f}", top.prompt_id, top.samples
    if over is not None:
        prompt = f"{prompt}, {over.n} sample{'s' * (over.n > 1)}"
        rise += "" if over.rise is None else f" +- {over.rise:.1f}"
        calibrated += "" if not calibrated or over.calibrated is None else f" +- {over.calibrated:.2f}"
        commits = f"{over.n_commit} of {over.n} commit" if over.n_commit and shown else ""
    response = tuple(filter(None, (commits, top.response if with_response else ""))) or ("",)
    return prompt, trait, f"{rise} sd", chance, calibrated, response


def _notes(layout: Layout, summary: Summary, *, has_chance: bool) -> Iterator[str]:
    remedy = _remedy(layout, summary)
    if any(top.samples is not None for top in summary.tops):
        yield "+-: the standard deviation over the samples of a prompt, of which the mean is shown"
    if has_chance or summary.is_against_set:
        mean = "the set" if summary.is_against_set else "the reference prompts"
        yield f"rise: from prompt to response, less the mean rise of {mean}, in standard deviations (sd)"
    if has_chance:
        yield (
            "chance: what the largest of as many rises stays below in 95 % of random directions and of ordinary prompts"
            + _scale(summary)
        )
        if (n_known := sum(top.chance is not None for top in summary.tops)) > 1:
            n_out = sum(top.stands_out for top in summary.tops)
            yield f"a trait stands out in {n_out} of {n_known} prompts; up to {0.05 * n_known:.2g} expected by chance"
    else:
        yield f"whether these rises are within chance is unknown: {remedy}" + _scale(summary)
    layers = {vector.layer for vector in summary.vectors}
    if len(layers) == 1 < len(summary.vectors):
        yield f"all vectors are of layer {layers.pop()}"
    found = summary.findings
    if found is not None:
        commit, persist = (100 * each / found.n_projections for each in (found.commit, found.persist))
        yield (
            f"of {counted(found.n_projections, 'projection')}, {commit:.0f} % commit and {persist:.0f} % persist; "
            f"of random directions, {100 * found.random_commit:.0f} % and {100 * found.random_persist:.0f} %"
        )
        yield (
            f"more clearly than 95 % of random directions: {found.clearly_commit} commit, {found.clearly_persist} "
            f"persist; {0.05 * found.n_projections:.2g} of each expected by chance"
        )
        if found.is_isotropic:
            yield f"without a reference, random directions are isotropic: {remedy}"


def _remedy(layout: Layout, summary: Summary) -> str:
    """What gives chance levels: projecting again, after an evaluation of the vectors' experiment if it lacks one."""
    from tlcapture.traits.vector_sources.packaged import vectors_layout

    names = {vector.experiment for vector in summary.vectors}
    others = () if names <= {layout.experiment} or len(names) > 1 else ("--vector-experiment", *names)
    project = command_line(layout, "project", "--all-prompt-sets", *others)
    fits = [_reference_fits(vectors_layout(layout.root, each.experiment), each) for each in summary.vectors]
    if fits and all(fits):
        return f"run '{project}'"
    if others and None not in fits:
        return f"the reference of experiment {others[1]!r} is of a model of another shape"
    source = vectors_layout(layout.root, *names) if others else layout
    return f"run '{command_line(source, 'evaluate')}', then '{project}'"


def _reference_fits(source: Layout, vector: UsedVector) -> bool | None:
    """Whether the reference beside a vector is of a model of its shape; `None` without a readable one."""
    from tlcapture.traits.statistics.reference import read_reference
    from tlcapture.traits.vector_files import VectorFiles

    with suppress(StorageError):
        reference = read_reference(source, vector.component)
        if reference is None:
            return None
        made = VectorFiles(source, Trait.parse(vector.trait)).metadata(vector.component, vector.method)
        return reference.fits(made.get("num_layers", 0), made.get("hidden_dim", 0))
    return None


def _doubts(layout: Layout, summary: Summary) -> Iterator[str]:
    """The doubts about the traits that the table names."""
    from tlcapture.traits.verdicts import Doubts

    shown = {top.trait for top in summary.tops if top.stands_out or top.chance is None}
    yield from Doubts(layout.root).lines(each for each in summary.vectors if each.trait in shown)


def _scale(summary: Summary) -> str:
    is_shown = any(top.calibrated is not None and (top.stands_out or top.chance is None) for top in summary.tops)
    return "; calibrated: 0 the negative examples, 1 the positive ones" if is_shown else ""
