"""What a run prints: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from math import inf
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.output.tables import Cell, Column, table_lines, terminal_width
from tlcapture.cli.stopping import StopSignals
from tlcapture.errors import TlcaptureError, refused_path
from tlcapture.runs.display import Display, Progress
from tlcapture.text import printable

if TYPE_CHECKING:
    import logging

    from tqdm import tqdm

    from tlcapture.runs.record import Invocation, RecordedReport
    from tlcapture.runs.report import RunReport
    from tlcapture.storage.experiments.layout import Layout

_MOST_LINES = 20  # of progress, where it is not shown as a bar
_COUNTED = ("prompt", "capture", "picture", "run")  # units that are counted in lines, even if nothing is said of each


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


def _log() -> logging.Logger:
    """The log of messages that the console shows."""
    from tlcapture.cli.output.logs import SHOWN

    return SHOWN
