"""What commands that do work have in common: how much they say, how they stop, what they end with.

@click.command()
@options
@working
def capture(console, ...):
    run_capture(..., console)

A command ends with what it wrote and each failure by name (with `--json`, as one JSON object), with a
record in the experiment, and with its exit status: 0 all done; 1 something failed, the rest done; 2
wrong usage; 130 and 143 told to stop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.console import Console
from tlcapture.cli.options import together
from tlcapture.cli.stopping import Interrupted, StopSignals
from tlcapture.errors import NoSpaceError, TlcaptureError

if TYPE_CHECKING:
    from tlcapture.runs.record import Invocation
_output_options = together(
    click.option("-v", "--verbose", is_flag=True, help="Say more: every file, batch and choice."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."),
    click.option(
        "--log-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Append all messages to a file, with times.",
    ),
    click.option("--json", "as_json", is_flag=True, help="End with a JSON object, alone on standard output."),
)


def working(command: Callable[..., None]) -> Callable[..., None]:
    """Make a function of the options and a `console` into a command that ends as this module says."""

    @_output_options
    @click.pass_context
    @wraps(command)
    def wrapped(
        ctx: click.Context, *, verbose: bool, quiet: bool, log_file: Path | None, as_json: bool, **options: Any
    ) -> None:
        if verbose and quiet:
            raise click.UsageError("give one of --verbose and --quiet")
        from tlcapture.cli.logs import logging_to

        with StopSignals() as stop, logging_to(log_file, verbose=verbose):
            console = Console(quiet=quiet, as_json=as_json, stop=stop, invocation=_invocation(ctx))
            ending = _run(command, console, options)
            _say(console, ending, as_json=as_json)
        sys.exit(ending.exit_code)

    return wrapped


@dataclass(frozen=True)
class _Ending:
    """How a command ended: `done`, `failed` or `interrupted`."""

    status: str
    exit_code: int
    error: str | None = None


def _run(command: Callable[..., None], console: Console, options: Mapping[str, Any]) -> _Ending:
    ending = _outcome(command, console, options)
    # Of a run that was refused before it wrote anything there is nothing to record.
    if console.recorded is not None and (console.recorded.n_files or not ending.error):
        said = len(console.recorded.warnings)
        console.recorded.end(ending.status, ending.exit_code, ending.error)
        for warning in console.recorded.warnings[said:]:
            console.warn(warning)
    return ending


def _outcome(command: Callable[..., None], console: Console, options: Mapping[str, Any]) -> _Ending:
    try:
        command(console=console, **options)
    except Interrupted as signal:
        return _Ending("interrupted", signal.exit_code, f"stopped by {signal}; to go on: {_going_on(options)}")
    except NoSpaceError as error:
        return _Ending("failed", error.exit_code, f"error: {error}; with room there, go on: {_going_on(options)}")
    except TlcaptureError as error:
        return _Ending("failed", error.exit_code, f"error: {error}")
    return _Ending("failed", 1) if console.recorded and console.recorded.failures else _Ending("done", 0)


def _going_on(options: Mapping[str, Any]) -> str:
    """The command line that does the rest."""
    import shlex

    skips = [] if options.get("skip_existing", True) else ["--skip-existing"]
    return shlex.join([*_command_line(), *skips])


def _command_line() -> list[str]:
    program = Path(sys.argv[0])
    called = ["python", sys.argv[0]] if program.suffix == ".py" and program.name != "__main__.py" else ["tlcapture"]
    return [*called, *sys.argv[1:]]


def _invocation(ctx: click.Context) -> Invocation:
    import shlex

    from tlcapture.runs.record import Invocation

    arguments = {name: _plain(value) for name, value in sorted(ctx.params.items())}
    return Invocation(str(ctx.command.name), shlex.join(_command_line()), arguments)


def _plain(value: Any) -> Any:
    """An option's value as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _say(console: Console, ending: _Ending, *, as_json: bool) -> None:
    report = console.recorded
    if as_json:
        content = {} if report is None else {**report.to_json(), "record": str(report.path)}
        said = {"status": ending.status, "exit_code": ending.exit_code, "error": ending.error, **console.facts}
        import json

        click.echo(json.dumps({**said, **content}, ensure_ascii=True))
    elif report is not None and (report.n_files or not ending.error):
        console.line(report.summary())
    for failure in report.failures if report else ():
        console.error(f"failed: {failure}")
    if ending.error:
        console.error(ending.error)
