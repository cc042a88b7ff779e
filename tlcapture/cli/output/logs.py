"""Sends log messages to standard error (`-v`) and to a file (`--log-file`)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import click

from tlcapture.text import printable

SHOWN = logging.getLogger("tlcapture.cli.shown")  # messages that the console shows itself
_LOGGER = logging.getLogger("tlcapture")


class _OneLine(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  logging's name
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _NotShown(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != SHOWN.name


@contextmanager
def logging_to(file: Path | None, *, verbose: bool) -> Iterator[None]:
    """Append all messages of the package to a file and, if `verbose`, print them to standard error."""
    handlers: list[logging.Handler] = []
    if file is not None:
        handlers.append(_file_handler(file))
    if verbose:
        shown = logging.StreamHandler(sys.stderr)
        shown.addFilter(_NotShown())
        shown.setFormatter(_OneLine("%(levelname)s %(name)s: %(message)s"))
        handlers.append(shown)
    level = _LOGGER.level
    try:
        for handler in handlers:
            _LOGGER.addHandler(handler)
        if handlers:
            _LOGGER.setLevel(logging.DEBUG)
        yield
    finally:
        _LOGGER.setLevel(level)
        for handler in handlers:
            _LOGGER.removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """A log file that warns once if it cannot be written, without stopping the run."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            reason = f"--log-file {self.baseFilename}: can no longer be written: {error.strerror}"
            click.secho(f"warning: {printable(reason)}", fg="yellow", err=True)

    def close(self) -> None:
        with suppress(OSError):  # from flushing its buffer
            super().close()


def _file_handler(file: Path) -> logging.Handler:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise click.UsageError(f"--log-file {file}: cannot be written: {error.strerror}") from None
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
