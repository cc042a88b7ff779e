"""Ctrl-C and a cluster's SIGTERM: the current file is completed, then the command ends.

Some work can stop only at the points where it calls `check`. During such work, a signal waits for the next check. At
any other time, and when it is repeated, a signal ends the command immediately.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping after the current file is written; repeat to stop immediately\n"


class Interrupted(KeyboardInterrupt):
    """The signal `number` told the command to stop."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C and 143 for SIGTERM, as in shells."""
        return 128 + self.number

    def __str__(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


class StopSignals:
    """A context manager that replaces Python's handling of the two signals."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._working = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_checks_only(self) -> Iterator[None]:
        """Within this context, a first signal waits for the next `check`, or for the end of the outermost context."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1
        if not self._working:
            self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal was received."""
        if self._asked is not None:
            raise Interrupted(self._asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None or not self._working:
            self._asked = number
            raise Interrupted(number)
        self._asked = number
        os.write(2, _NOTE)  # print is not safe in a signal handler
