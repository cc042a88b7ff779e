"""How a run looks on the terminal: a progress bar there, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tlcapture.errors import TlcaptureError
from tlcapture.printable import printable
from tlcapture.runs.report import Progress, Reporter, RunReport

if TYPE_CHECKING:
    from tqdm import tqdm


class Console(Reporter):
    """Lines to standard output, warnings and progress to standard error."""

    def line(self, text: str) -> None:
        click.echo(printable(text))

    def warn(self, text: str) -> None:
        click.secho(f"warning: {printable(text)}", fg="yellow", err=True)

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        if not total:
            yield Progress()
        elif sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=total, desc=label, unit=f" {unit}s", leave=False) as bar:
                yield _Bar(bar)
        else:
            yield _Lines()


class _Bar(Progress):
    def __init__(self, bar: tqdm[Any]):
        self._bar = bar

    def advance(self, units: int = 0, *, done: str | None = None) -> None:
        self._bar.update(units)
        if done:
            self._bar.set_postfix_str(printable(done))


class _Lines(Progress):
    def advance(self, units: int = 0, *, done: str | None = None) -> None:
        if done:
            click.echo(printable(done), err=True)


def finish(report: RunReport) -> NoReturn:
    """Say what a run did, name each failure, and exit: 0 all done, 1 something failed."""
    click.echo(printable(report.summary()))
    for failure in report.failures:
        click.secho(f"failed: {printable(failure)}", fg="red", err=True)
    sys.exit(1 if report.failures else 0)


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an error that is raised on purpose into one line and its exit status."""

    @wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except TlcaptureError as error:
            click.secho(f"error: {printable(str(error))}", fg="red", err=True)
            sys.exit(error.exit_code)

    return wrapped


def show_top_traits(layout: Any, prompt_set: str, component: str = "residual") -> None:
    """Print by prompt which trait rose most, where it committed, and the response."""
    from tlcapture.runs.summary import top_traits

    tops = top_traits(layout, prompt_set, component)
    if not tops:
        return
    click.echo(f"\n{prompt_set}: the trait that rose most, against the other prompts of the set\n")
    width = max(len(top.trait) for top in tops)
    for top in tops:
        where = "does not commit" if top.token is None else f"commits at {top.commitment_point:>3} {top.token!r}"
        click.echo(f"{top.prompt_id:>4}  {top.trait:<{width}}  {top.rise:+.1f} sd  {printable(where)}")
        click.echo(f"      {printable(top.response)}")
    click.echo()
