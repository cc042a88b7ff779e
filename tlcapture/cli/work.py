"""The frame of all commands that do work: how much they print, how they stop, and how they end.

    @click.command()
    @options_of(ModelOptions, "model")
    @working
    def capture(console: Console, model: ModelOptions) -> None: ...

A command ends by printing what it wrote and each failure by name (as one JSON object with `--json`), by writing a
record to the experiment, and with an exit status: 0 for success; 1 if something failed and the rest is done; 2 for
wrong usage; 130 or 143 if a signal stopped it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.options.grouping import option, options_of
from tlcapture.cli.options.types import LocalPath
from tlcapture.cli.output.console import Console
from tlcapture.cli.stopping import Interrupted, StopSignals
from tlcapture.errors import NoSpaceError, TlcaptureError, refused_path
from tlcapture.folder_names import named
from tlcapture.text import first_lines, shell_join

if TYPE_CHECKING:
    from tlcapture.runs.record import Invocation


@dataclass(frozen=True)
class _OutputOptions:
    """What a command prints and where, and how safely it writes."""

    verbose: bool = option("-v", "--verbose", is_flag=True, help="Also report every file, batch and choice.")
    quiet: bool = option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
    log_file: Path | None = option(
        "--log-file", type=LocalPath(dir_okay=False), help="Append all messages to a file, with timestamps."
    )
    as_json: bool = option(
        "--json", "as_json", is_flag=True, help="Print a JSON object at the end, and nothing else to standard output."
    )
    fsync: bool = option("--fsync", is_flag=True, help="Flush each file and its folder to disk before continuing.")


def working(command: Callable[..., None]) -> Callable[..., None]:
    """Pass a `console` to a command, and end it as described in this module's docstring."""

    @options_of(_OutputOptions, "output")
    @click.pass_context
    @wraps(command)
    def wrapped(ctx: click.Context, *, output: _OutputOptions, **options: Any) -> None:
        if output.verbose and output.quiet:
            raise click.UsageError("give one of --verbose and --quiet")
        from tlcapture.cli.output.logs import logging_to
        from tlcapture.storage.files import FSYNC, fsyncing

        _check_executor(ctx)
        is_elsewhere = ctx.params.get("ray_address") or os.environ.get("RAY_ADDRESS")
        if output.fsync and ctx.params.get("executor") == "ray" and is_elsewhere:
            raise click.UsageError(
                f"--fsync does not reach a Ray cluster that runs already: set {FSYNC}=1 for 'ray start' on every node"
            )
        logs = logging_to(output.log_file, verbose=output.verbose)
        with StopSignals() as stop, logs, fsyncing(asked=output.fsync):
            console = Console(quiet=output.quiet, as_json=output.as_json, stop=stop, invocation=_invocation(ctx))
            ending = _run(ctx, lambda: command(console=console, **options), console)
            _print_ending(console, ending)
        sys.exit(ending.exit_code)

    return wrapped


def _check_executor(ctx: click.Context) -> None:
    """Raise `click.UsageError` for an executor that cannot work in a remote root."""
    from tlcapture.storage.remote.roots import url_of

    root = ctx.params.get("root")
    url = url_of(root) if ctx.params.get("executor") == "ray" and root is not None else None
    if url is not None:
        raise click.UsageError(
            f"--executor ray needs a root that is a folder on every node, not {url}: let each node run a shard "
            "instead, --shard 1/N to N/N"
        )


@dataclass(frozen=True)
class _Ending:
    """How a command ended: `done`, `failed` or `interrupted`; `error` is what ended it."""

    status: str
    exit_code: int
    error: str | None = None

    @property
    def message(self) -> str | None:
        """The error as it is printed."""
        return f"error: {self.error}" if self.error and self.status == "failed" else self.error


def _run(ctx: click.Context, command: Callable[[], None], console: Console) -> _Ending:
    try:
        ending = _outcome(ctx, command, console)
    except BaseException as error:
        if console.recorded is not None and console.recorded.n_files:
            console.recorded.end("failed", 1, f"{type(error).__name__}: {error}")
        raise
    # A run that was refused before it wrote anything leaves no record.
    if console.recorded is not None and (console.recorded.n_files or not ending.error):
        n_shown = len(console.recorded.warnings)
        console.recorded.end(ending.status, ending.exit_code, ending.error)
        for warning in console.recorded.warnings[n_shown:]:
            console.warn(warning)
    return ending


def _outcome(ctx: click.Context, command: Callable[[], None], console: Console) -> _Ending:
    try:
        command()
    except Interrupted as signal:
        return _Ending("interrupted", signal.exit_code, f"stopped by {signal}; to resume: {_resuming(ctx)}")
    except NoSpaceError as error:
        return _Ending("failed", error.exit_code, f"{error}; after freeing space, resume: {_resuming(ctx)}")
    except TlcaptureError as error:
        return _Ending("failed", error.exit_code, str(error))
    except OSError as error:
        refused = refused_path(error)
        return _Ending("failed", refused.exit_code, str(refused))
    return _Ending("failed", 1) if console.recorded and console.recorded.failures else _Ending("done", 0)


def _resuming(ctx: click.Context) -> str:
    """The command line that does the rest of the work."""
    skips = [] if ctx.params.get("skip_existing", True) else ["--skip-existing"]
    return shell_join([*_command_line(), *skips])


def _command_line() -> list[str]:
    program = Path(sys.argv[0])
    called = ["python", sys.argv[0]] if program.suffix == ".py" and program.name != "__main__.py" else ["tlcapture"]
    return [*called, *sys.argv[1:]]


def _invocation(ctx: click.Context) -> Invocation:
    from tlcapture.runs.record import Invocation

    arguments = {name: _json_value(value) for name, value in sorted(ctx.params.items())}
    return Invocation(str(ctx.command.name), shell_join(_command_line()), arguments)


def _json_value(value: Any) -> Any:
    """The value of an option as JSON holds it."""
    if isinstance(value, list | tuple):
        return [_json_value(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else named(str(value))


def _print_ending(console: Console, ending: _Ending) -> None:
    report = console.recorded
    if console.as_json:
        content = {} if report is None else {**report.to_json(), "record": named(str(report.path))}
        summary = {"status": ending.status, "exit_code": ending.exit_code, "error": ending.error, **console.facts}
        click.echo(json.dumps({**summary, **content}, ensure_ascii=True))
    elif report is not None and (report.n_files or not ending.error):
        console.line(report.summary())
    if report is not None:
        for failure in first_lines(report.failures, f": all are in {report.path}" * report.path.exists()):
            console.error(f"failed: {failure}")
    has_nothing = report is not None and report.failures and not (report.n_files or report.n_skipped)
    if console.next and not ending.error and not has_nothing:
        console.line(f"next: {console.next}")
    if ending.message:
        console.error(ending.message)
