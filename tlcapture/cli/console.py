"""What a run prints: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from math import inf
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.stopping import StopSignals
from tlcapture.cli.tables import Cell, Column, table_lines, terminal_width
from tlcapture.errors import TlcaptureError, refused_path
from tlcapture.names import split_name
from tlcapture.runs.display import Display, Progress
from tlcapture.text import counted, printable

if TYPE_CHECKING:
    import logging

    from tqdm import tqdm

    from tlcapture.commands.top_traits import Summary, TopTrait
    from tlcapture.names import PromptId
    from tlcapture.runs.record import Invocation, RecordedReport
    from tlcapture.runs.report import RunReport
    from tlcapture.storage.layout import Layout

_MOST_LINES = 20  # of progress, where it is not shown as a bar
_COUNTED = ("prompt", "capture", "picture", "run")  # units that are counted in lines, even if nothing is said of each
_MOST_SHOWN = 200  # largest number of prompts whose projections are read at the end of a run


class Console(Display):
    """Prints lines to standard output, and warnings and progress to standard error.

    With `as_json`, standard output is reserved for a JSON object, and lines are printed to standard error too.

    Attributes:
        facts: what the run uses that its options do not name, such as the model.
        next: the command to run next, which is printed at the very end.
        recorded: the report of the run, once it has begun.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        as_json: bool = False,
        stop: StopSignals | None = None,
        invocation: Invocation | None = None,
    ):
        self._quiet = quiet
        self.as_json = as_json
        self._stop = stop or StopSignals()
        self._invocation = invocation
        self.facts: dict[str, Any] = {}
        self.next: str | None = None
        self._task = (1, 1)
        self.recorded: RecordedReport | None = None

    def line(self, text: str = "") -> None:
        """Print a line, unless the command is quiet."""
        if text:
            _log().info(text)
        if not self._quiet:
            click.echo(printable(text), err=self.as_json)

    def coloured(self, text: str) -> None:
        """Print text that holds a terminal's colours, unless the command is quiet."""
        if not self._quiet:
            click.echo(text, err=self.as_json)

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> None:
        """Print a table, wrapped to the width of the terminal if it goes to one."""
        stream = sys.stderr if self.as_json else sys.stdout
        lines = list(table_lines(columns, rows, terminal_width(stream)))
        for line in lines:
            _log().info(line)
        if lines and not self._quiet:
            click.echo("\n".join(map(printable, lines)), err=self.as_json)

    def warn(self, text: str) -> None:
        """Print a warning to standard error."""
        _log().warning(text)
        click.secho(f"warning: {printable(text)}", fg="yellow", err=True)

    def error(self, text: str) -> None:
        """Print an error to standard error."""
        _log().error(text)
        click.secho(printable(text), fg="red", err=True)

    def uses(self, **facts: Any) -> None:
        """Record facts about what the run uses."""
        self.facts.update(facts)

    def report(self, layout: Layout) -> RunReport:
        """The report of a run that is about to begin; within a command it is also written to a record."""
        if self._invocation is None:
            return super().report(layout)
        from tlcapture.runs.record import RecordedReport

        self.recorded = RecordedReport(layout, self._invocation, self.facts)
        return self.recorded

    def task(self, number: int, n_tasks: int) -> None:
        """Remember which task is done, for the lines of its progress."""
        self._task = (number, n_tasks)

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        """Show a progress bar on a terminal, and elsewhere lines of what was done, at most some 20."""
        with self._stop.at_checks_only():
            if total and not self._quiet and sys.stderr.isatty():
                from tqdm import tqdm

                with tqdm(total=total, desc=label, unit=f" {unit}s", leave=False) as bar:
                    yield _Bar(self._stop, bar)
            else:
                yield _Lines(self._stop, total if not self._quiet else 0, label, unit, self._task)


class _Bar(Progress):
    def __init__(self, stop: StopSignals, bar: tqdm[Any]):
        self._stop = stop
        self._bar = bar

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        self._bar.update(units)
        if done:
            _log().info(done)
            self._bar.set_postfix_str(printable(done))
        self._stop.check()

    def state(self, text: str) -> None:
        self._bar.set_postfix_str(printable(text))


class _Lines(Progress):
    """Lines that say how much is done: a share of tokens, whose number is not known before, and otherwise n of N.

    A total of 0 shows none. `task` are the number of the task and how many there are.
    """

    def __init__(self, stop: StopSignals, total: int, label: str, unit: str, task: tuple[int, int]):
        self._stop = stop
        self._total = total
        self._label = label
        self._unit = unit
        self._task = task
        self._n_done = 0
        self._next = 0.0  # units that have to be done before the next line

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        self._n_done += units
        if done:
            _log().info(done)
        at = self._n_done if share is None else share * self._total
        is_counted = units > 0 and self._total > 1 and self._unit in _COUNTED
        if self._total and (done or is_counted) and at >= self._next:
            click.echo(printable(done or self._label) + (self._so_far() if share is None else ""), err=True)
            self._next = at + self._total / _MOST_LINES if at < self._total else inf
        self._stop.check()

    def _so_far(self) -> str:
        number, n_tasks = self._task
        if self._unit == "token":
            return f" ({min(1.0, self._n_done / self._total):.0%})"
        if self._unit in _COUNTED:
            return f" ({self._n_done} of {self._total})" if self._total > 1 else ""
        return f" ({number} of {n_tasks})" if n_tasks > 1 else ""


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print an error of the package, or Ctrl-C, as one line, and exit with its status."""

    @wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except TlcaptureError as error:
            Console().error(f"error: {error}")
            sys.exit(error.exit_code)
        except OSError as error:
            refused = refused_path(error)
            Console().error(f"error: {refused}")
            sys.exit(refused.exit_code)
        except KeyboardInterrupt:
            Console().error("stopped by Ctrl-C")
            sys.exit(130)

    return wrapped


def show_top_traits(
    console: Console,
    layout: Layout,
    prompt_set: str,
    component: str,
    report: RunReport,
    given: Sequence[PromptId] = (),
) -> None:
    """Print, for each prompt, the trait that rose more than chance, where it committed, and the response.

    Below, how many projections commit and persist, beside random directions. For a large set, print only how to view
    it; of one that is not projected, print the responses. The `report` of the run says what it wrote and looked at,
    which is not read again. Where prompts were `given` as text, only they are shown, each with its whole answer.
    """
    from dataclasses import replace

    from tlcapture.cli.answers import show_answers, show_unprojected
    from tlcapture.commands.saved_summaries import summary_of_run
    from tlcapture.storage.command_lines import command_line

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
        show_unprojected(console, layout, prompt_set, names)


def _show_tops(console: Console, layout: Layout, prompt_set: str, summary: Summary, *, with_responses: bool) -> None:
    console.line()
    has_chance = any(top.chance is not None for top in summary.tops)
    alone = "the reference prompts" if has_chance else "its own spread along the tokens"
    against = "the other prompts of the set" if summary.is_against_set else alone
    layers = {each.layer for each in summary.vectors}
    at = f" at layer {min(layers)}" if len(layers) == 1 else ""
    console.line(f"{prompt_set}: the trait that rose most{at}, against {against}")
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
    from tlcapture.storage.command_lines import command_line

    again = f"'{command_line(layout, 'evaluate')}', then '{command_line(layout, 'project', '--all-prompt-sets')}'"
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
        yield f"whether these rises are within chance is unknown: run {again}" + _scale(summary)
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
            yield f"without a reference, random directions are isotropic: run {again}, for the activations' covariance"


def _doubts(layout: Layout, summary: Summary) -> Iterator[str]:
    """The doubts about the traits that the table names."""
    from tlcapture.traits.verdicts import Doubts

    shown = {top.trait for top in summary.tops if top.stands_out or top.chance is None}
    yield from Doubts(layout.root).lines(each for each in summary.vectors if each.trait in shown)


def _scale(summary: Summary) -> str:
    is_shown = any(top.calibrated is not None and (top.stands_out or top.chance is None) for top in summary.tops)
    return "; calibrated: 0 the negative examples, 1 the positive ones" if is_shown else ""


def _log() -> logging.Logger:
    """The log of messages that the console shows."""
    from tlcapture.cli.logs import SHOWN

    return SHOWN
