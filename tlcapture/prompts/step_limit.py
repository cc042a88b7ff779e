"""A limit to the steps of code that comes with a checkpoint, such as a chat template that never ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StepLimitError(BaseException):
    """The limit was reached. It is no `Exception`, so that the code it ends cannot catch it unawares."""


@contextmanager
def step_limit(count: int, seconds: float = 60) -> Iterator[None]:
    """Raise `StepLimitError` in this thread once more than `count` lines of Python were run within the context.

    Also once these have taken so many seconds, since a step may take long.

    A debugger or a measurement of coverage sees nothing of what runs within, and goes on after it.
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
