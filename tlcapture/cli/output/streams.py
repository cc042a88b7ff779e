"""Standard output and error that take whatever a command prints, so that printing never stops its work.

A stream may be closed, on a full disk, or a pipe whose reader has ended, and its encoding may lack a character.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_NAMES = ("stdout", "stderr")


class _Lasting(io.FileIO):
    """A file that drops what it cannot take; `failure` is the first error."""

    failure: OSError | None = None

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """Write data, unless that failed before."""
        try:
            if self.failure is None:
                return super().write(data)
        except OSError as error:
            self.failure = error
        return memoryview(data).nbytes


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace both streams by ones that never raise; exit with status 1 where standard output was lost."""
    before = {name: getattr(sys, name) for name in _NAMES}
    files = {name: _replace(name, stream) for name, stream in before.items()}
    code: str | int | None = None
    try:
        yield
    except SystemExit as ended:
        code = ended.code
        raise
    except BaseException:
        code = 1
        raise
    finally:
        for name in _NAMES:
            getattr(sys, name).flush()
        output = files["stdout"]
        failure = None if output is None else output.failure
        if failure is not None and failure.errno != errno.EPIPE:
            print(f"error: standard output cannot be written: {failure.strerror}", file=sys.stderr, flush=True)
        for name, stream in before.items():
            setattr(sys, name, stream)
        if failure is not None and not code:
            sys.exit(1)


def _replace(name: str, stream: TextIO | None) -> _Lasting | None:
    """Replace a stream, and return its file; `None` for a terminal, and for one that is not a file."""
    if stream is None:  # its descriptor is taken, or else the next file that is opened would get it
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  it is open to the end
        return None
    if not isinstance(stream, io.TextIOWrapper):
        return None
    errors = "replace" if stream.errors == "strict" else stream.errors
    try:
        file = None if stream.isatty() else _Lasting(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError):  # a stream in memory
        return None
    if file is None:
        stream.reconfigure(errors=errors)
        return None
    stream.flush()
    buffer = io.BufferedWriter(file)  # type: ignore[type-var]
    made = io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=stream.line_buffering)
    setattr(sys, name, made)
    return file
