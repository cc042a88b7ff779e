"""Writing files in another thread: in order, completely, and with every failure reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tlcapture.errors import NoSpaceError, StorageError
from tlcapture.runs.background_writer import BackgroundWriter
from tlcapture.runs.run import Run
from tlcapture.storage.files import Written
from tlcapture.storage.layout import Layout


def test_all_files_are_written_in_order_by_another_thread_before_the_context_ends() -> None:
    run, written, threads = Run.silent(Layout(Path("x"), "exp")), [], set()

    def file(number: int) -> Callable[[], Written]:
        def write() -> Written:
            time.sleep(0.01)
            written.append(number)
            threads.add(threading.get_ident())
            return Written(Path("x"), number)

        return write

    with BackgroundWriter(run) as writer:
        for prompt in range(3):
            writer.write(str(prompt), [file(2 * prompt), file(2 * prompt + 1)])
    assert written == list(range(6))
    assert threads.isdisjoint({threading.get_ident()})
    assert (run.report.n_files, run.report.files.size) == (6, 15)


def test_a_file_that_fails_is_reported_and_the_others_are_written() -> None:
    run = Run.silent(Layout(Path("x"), "exp"))

    def fail() -> Written:
        raise StorageError("disk full")

    with BackgroundWriter(run) as writer:
        writer.write("set/1", [fail, lambda: Written(Path("x"), 7)])
    assert run.report.failures == [("set/1", "disk full")]
    assert run.report.n_files == 1


def test_queued_files_are_written_even_if_the_run_is_interrupted() -> None:
    run = Run.silent(Layout(Path("x"), "exp"))

    def break_off() -> None:
        with BackgroundWriter(run) as writer:
            writer.write("set/1", [lambda: Written(Path("x"), 3)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert run.report.n_files == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_fails_the_prompt_of_the_files(error: Exception) -> None:
    run, done = Run.silent(Layout(Path("x"), "exp")), []

    def fail(how: Exception) -> Written:
        raise how

    with BackgroundWriter(run) as writer:
        writer.write("set/1", [lambda: fail(error), lambda: fail(StorageError("no")), lambda: Written(Path("x"), 1)])
        writer.write("set/2", [lambda: Written(Path("x"), 1)], then=lambda: done.append("set/2"))
    assert run.report.failures == [("set/1", "out of memory while its files were written"), ("set/1", "no")]
    assert run.report.n_files == 2
    assert done == ["set/2"]


def test_a_full_disk_ends_the_run_after_the_written_files_are_reported() -> None:
    run = Run.silent(Layout(Path("x"), "exp"))

    def fail() -> Written:
        raise NoSpaceError("disk full")

    writer = BackgroundWriter(run)
    writer.write("set/1", [fail, lambda: Written(Path("x"), 7)])
    with pytest.raises(NoSpaceError):
        writer.finish()
    assert run.report.n_files == 1
