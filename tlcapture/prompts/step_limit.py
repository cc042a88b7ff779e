"""A limit to the steps of code that comes with a checkpoint, such as a chat template that never ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StepLimitError(BaseException):
    """The limit was reached. Not an `Exception`, so that the code that it ends does not catch it by accident."""


@contextmanager
def step_limit(count: int, seconds: float = 60) -> Iterator[None]:
    """Raise `StepLimitError` in this thread after `count` lines of Python, or `seconds`, within the context.

    Debuggers and coverage measurements see nothing of the code within, and continue afterwards.
    """
    steps, end = 0, time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > count:
            raise StepLimitError(f"does not end within {count:,} steps")
        if steps % 100 == 0 and time.monotonic() > end:
            raise StepLimitError(f"does not end within {seconds:g} s")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
