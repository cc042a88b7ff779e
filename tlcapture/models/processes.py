"""Loading a model must not start a process: an attempt raises an error in the thread that loads, and only there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Python's audit events for starting a process.
_PROCESS_EVENTS = frozenset(
    [
        "subprocess.Popen",
        "os.system",
        "os.fork",
        "os.forkpty",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "pty.spawn",
    ]
)


class _Guarded(threading.local):
    """The number of guards that are active in a thread."""

    depth = 0


_guarded = _Guarded()


class ProcessRefusedError(PermissionError):
    """Loading a model tried to start a process."""


@contextmanager
def no_processes() -> Iterator[None]:
    """Refuse to start processes from this thread while the context is active."""
    _install_audit_hook()
    _guarded.depth += 1
    try:
        yield
    finally:
        _guarded.depth -= 1


def is_guarded() -> bool:
    """Whether `no_processes` is active in this thread."""
    return _guarded.depth > 0


@cache
def _install_audit_hook() -> None:
    """Refuse to start processes from guarded threads; the hook stays installed until this process ends."""

    # The defaults keep these names available to calls at interpreter shutdown, when module globals may be gone.
    def refuse(
        event: str, args: tuple[Any, ...], starts: frozenset[str] = _PROCESS_EVENTS, guarded: Any = _guarded
    ) -> None:
        if event in starts and guarded.depth:
            raise ProcessRefusedError(f"loading a model must not start a process: {_command(event, args)}")

    sys.addaudithook(refuse)


def _command(event: str, args: tuple[Any, ...]) -> str:
    words = args[1] if event in ("subprocess.Popen", "os.posix_spawn", "os.exec") and len(args) > 1 else args[:1]
    return " ".join(map(str, words)) if isinstance(words, list | tuple) and words else str(words or event)
