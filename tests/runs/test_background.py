"""Writing files in other threads: completely, within bounded memory, and with every failure reported."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from tlcapture.errors import NoSpaceError, StorageError
from tlcapture.runs import background_writer
from tlcapture.runs.background_writer import BackgroundWriter, Job
from tlcapture.runs.display import Display
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.file_index import Learned
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState, Written

LAYOUT = Layout(Path("x"), "exp")
WRITERS = [0, 1, 3]


def file(number: int, seconds: float = 0.0) -> Job:
    def write(run: Run) -> None:
        time.sleep(seconds)
        run.wrote(Written(Path(f"x/{number}"), number))

    return write


def failing(error: Exception) -> Job:
    def write(run: Run) -> None:
        raise error

    return write


def numbers(run: Run) -> list[int]:
    return [size for _, size in run.report.files.listed]


@pytest.mark.parametrize("n_writers", WRITERS)
def test_all_jobs_are_done_and_reported_in_their_order_before_the_context_ends(n_writers: int) -> None:
    run = Run.silent(LAYOUT)
    with BackgroundWriter(run, n_writers) as writer:
        for number in range(6):
            writer.submit(file(number, 0.01 * (6 - number)))  # later ones end first
    assert numbers(run) == list(range(6))
    assert (run.report.n_files, run.report.files.size) == (6, 15)


@pytest.mark.parametrize("n_writers", WRITERS)
def test_jobs_run_at_the_same_time_in_as_many_other_threads_as_there_are_writers(n_writers: int) -> None:
    together, threads = threading.Barrier(max(1, n_writers)), set()

    def job(run: Run) -> None:
        threads.add(threading.get_ident())
        together.wait(timeout=10)

    with BackgroundWriter(Run.silent(LAYOUT), n_writers) as writer:
        for _ in range(2 * max(1, n_writers)):
            writer.submit(job)
    assert len(threads) == max(1, n_writers)
    assert (threading.get_ident() in threads) == (n_writers == 0)


@pytest.mark.parametrize("n_processes", [0, 2])
def test_each_thread_computes_alone_and_one_more_waits_for_each_process(n_processes: int) -> None:
    def n_threads() -> set[int]:
        blas = [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
        return {torch.get_num_threads(), *blas}

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outside, inside = n_threads(), []
        with threadpool_limits(2, user_api="blas"):
            with BackgroundWriter(Run.silent(LAYOUT), n_processes=n_processes) as writer:
                writer.submit(lambda run: inside.append(n_threads()))
            assert n_threads() == {2}
        assert inside == [{1}]
        assert n_threads() == outside
    finally:
        torch.set_num_threads(before)
    assert writer._n_writers - BackgroundWriter(Run.silent(LAYOUT))._n_writers == n_processes


def test_the_switch_does_everything_in_the_thread_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_WRITERS", "0")
    run, threads = Run.silent(LAYOUT), []
    with BackgroundWriter(run) as writer:
        writer.submit(lambda run: threads.append(threading.current_thread()))
        assert threads == [threading.current_thread()]


def test_waiting_jobs_hold_no_more_memory_than_allowed_unless_one_alone_needs_more() -> None:
    lock, held, most = threading.Lock(), 0, 0

    def job(n_bytes: int) -> Job:
        def work(run: Run) -> None:
            nonlocal held
            time.sleep(0.005)
            with lock:
                held -= n_bytes

        return work

    with BackgroundWriter(Run.silent(LAYOUT), 3, most_bytes=100) as writer:
        for n_bytes in [40, 40, 40, 10, 10, 250, 40, 100, 1, 60, 60] * 3:
            writer.submit(job(n_bytes), n_bytes)
            with lock:
                held += n_bytes
                most = max(most, held if n_bytes < 250 else held - 150)
    assert 80 <= most <= 100


def test_what_a_job_held_is_released_when_it_ends() -> None:
    class Activations:
        pass

    held = Activations()
    alive = weakref.ref(held)

    def job(run: Run, held: Activations) -> None:
        run.wrote(Written(Path("x"), 1))

    gc.disable()
    try:
        with BackgroundWriter(Run.silent(LAYOUT), 1) as writer:
            writer.submit(lambda run, held=held: job(run, held))  # type: ignore[misc]
            del held
            is_next = threading.Event()
            writer.submit(lambda run: is_next.set())
            assert is_next.wait(10)
            writer.collect()
            assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("n_writers", WRITERS)
def test_failures_and_warnings_of_a_job_are_those_of_the_run_reported_in_the_thread_of_the_caller(
    n_writers: int,
) -> None:
    class Shown(Display):
        def warn(self, text: str) -> None:
            shown.append((text, threading.current_thread()))

    shown: list[tuple[str, threading.Thread]] = []
    run = Run(LAYOUT, RunReport(LAYOUT.folder), Shown())

    def job(run: Run) -> None:
        run.warn("odd")
        for name, error in (("set/1", StorageError("no")), ("set/2", StorageError("not that either"))):
            with run.attempt(name):
                raise error
        run.report.n_prompts += 1

    with BackgroundWriter(run, n_writers) as writer:
        writer.submit(job)
        writer.submit(job)
    assert run.report.failures == [("set/1", "no"), ("set/2", "not that either")] * 2
    assert run.report.n_prompts == 2
    assert shown == [("odd", threading.current_thread())]


def test_ended_jobs_are_reported_while_the_model_continues() -> None:
    run, ended = Run.silent(LAYOUT), threading.Event()

    def last(run: Run) -> None:
        ended.set()

    with BackgroundWriter(run, 1) as writer:
        writer.submit(file(7))
        writer.submit(last)
        assert ended.wait(10)
        writer.collect()
        assert numbers(run) == [7]


@pytest.mark.parametrize("n_writers", [1, 3])
def test_submitted_jobs_are_done_even_if_the_run_is_interrupted(n_writers: int) -> None:
    run = Run.silent(LAYOUT)

    def break_off() -> None:
        with BackgroundWriter(run, n_writers) as writer:
            for number in range(5):
                writer.submit(file(number, 0.01))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert numbers(run) == list(range(5))


def test_a_full_disk_ends_the_run_after_what_was_written_is_reported() -> None:
    run, begun = Run.silent(LAYOUT), []

    def full(run: Run) -> None:
        run.wrote(Written(Path("x/1"), 7))
        raise NoSpaceError("disk full")

    def later(run: Run) -> None:
        begun.append(1)

    hold = threading.Event()

    def write() -> None:
        with BackgroundWriter(run, 1) as writer:
            for job in (lambda run: hold.wait(10), file(3), full, later):
                writer.submit(job)
            hold.set()

    with pytest.raises(NoSpaceError, match="disk full"):
        write()
    assert numbers(run) == [3, 7]
    assert not begun  # nothing more is tried on a full disk


@pytest.mark.parametrize("n_writers", WRITERS)
def test_an_error_of_the_program_is_raised_in_the_thread_of_the_caller(n_writers: int) -> None:
    def fail() -> None:
        with BackgroundWriter(Run.silent(LAYOUT), n_writers) as writer:
            writer.submit(failing(ZeroDivisionError("a bug")))

    with pytest.raises(ZeroDivisionError, match="a bug"):
        fail()


def test_a_second_signal_drops_jobs_that_have_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun, go_on = Run.silent(LAYOUT), threading.Event(), threading.Event()

    def first(run: Run) -> None:
        run.wrote(Written(Path("x/7"), 7))
        begun.set()
        go_on.wait(10)

    def interrupted(futures: object) -> None:
        begun.wait(10)
        raise KeyboardInterrupt

    writer = BackgroundWriter(run, 1)
    for job in (first, file(8), file(9)):
        writer.submit(job)
    monkeypatch.setattr(background_writer, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), writer:
        pass
    go_on.set()
    for thread in writer._pool._threads:
        thread.join(10)
    writer.collect()
    assert numbers(run) == [7]


@pytest.mark.parametrize("n_writers", [0, 2])
def test_threads_take_short_turns_while_files_are_written(n_writers: int) -> None:
    """Python's 5 ms would be waited for by the model's thread after each kernel that it launches."""
    before, inside = sys.getswitchinterval(), 0.0

    def fail() -> None:
        nonlocal inside
        with BackgroundWriter(Run.silent(LAYOUT), n_writers):
            inside = sys.getswitchinterval()
            raise StorageError("broken")

    with pytest.raises(StorageError):
        fail()
    assert (inside < 1e-3) == (n_writers > 0)
    assert sys.getswitchinterval() == before


def test_a_full_report_still_knows_the_last_state_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the summary of an earlier run would be taken for that of files that were written again."""
    monkeypatch.setattr("tlcapture.runs.report._MOST_REMEMBERED", 1)
    report, (first, second) = RunReport(tmp_path), (tmp_path / "1.json", tmp_path / "2.json")
    for path, size in ((first, 1), (second, 1), (first, 2)):
        report.learn(path, Learned(FileState(size, 0, 0), ()))
        report.remember({path.name: b"%d" % size})
    assert report.seen == {first: FileState(2, 0, 0)}
    assert report.projected == {"1.json": b"2"}
