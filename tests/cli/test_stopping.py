"""When a signal stops the work of a command."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tlcapture.cli.stopping import Interrupted, StopSignals


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def work(stop: StopSignals, *steps: Callable[[], object]) -> None:
    with stop, stop.at_checks_only():
        for step in steps:
            step()


def test_a_signal_waits_for_the_next_check() -> None:
    done: list[str] = []
    stop = StopSignals()
    with pytest.raises(Interrupted):
        work(stop, send_sigterm, lambda: done.append("this file"), stop.check, lambda: done.append("the next file"))
    assert done == ["this file"]


def test_a_signal_after_the_last_check_stops_the_command_at_the_end_of_that_work() -> None:
    """What comes after that work, such as the next prompt set, may call no `check` for long."""
    done: list[str] = []
    stop = StopSignals()
    with pytest.raises(Interrupted) as stopped:
        work(stop, stop.check, lambda: work(stop, send_sigterm), lambda: done.append("the outer work too"))
    assert (stopped.value.exit_code, str(stopped.value)) == (143, "SIGTERM")
    assert done == ["the outer work too"]


def test_an_error_of_the_work_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ZeroDivisionError):
        work(StopSignals(), send_sigterm, lambda: 1 / 0)


def test_a_signal_outside_such_work_and_a_second_one_stop_immediately() -> None:
    with pytest.raises(Interrupted), StopSignals():
        send_sigterm()
    with pytest.raises(Interrupted):
        work(StopSignals(), send_sigterm, send_sigterm, lambda: pytest.fail("the second signal had to stop it"))
