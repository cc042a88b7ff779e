"""Work in other Python processes: the same results, errors and files, also where a process does not last."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from tlcapture.runs.processes import Processes, _end, leaving_processors, starting_early


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process import nothing ahead of its work, which takes longer than everything else that it does here."""
    monkeypatch.setattr("tlcapture.runs.processes._prepare", os.getpid)


@pytest.fixture
def started(unprepared: None, monkeypatch: pytest.MonkeyPatch) -> Processes:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    processes = Processes()
    processes.announce(1)
    return processes


@pytest.fixture(scope="module")
def running() -> Iterator[Processes]:
    """A process that several tests give work to, started by a process that computes with two threads."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCAPTURE_PROCESSES", "1")
        patch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        processes = Processes()
        processes.announce(1)
        assert len(processes) == 1
        assert processes.call(os.getpid) != os.getpid()
        torch.set_num_threads(before)
    yield processes
    _end(processes._started)


def test_results_and_errors_are_those_of_the_function(running: Processes) -> None:
    assert running.call(math.hypot, 3.0, 4.0) == 5.0
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        running.call(math.sqrt, -1.0)
    assert running.call(math.sqrt, 4.0) == 2.0


def test_the_work_of_a_process_that_was_killed_is_done_here(started: Processes) -> None:
    os.kill(started.call(os.getpid), signal.SIGKILL)
    assert started.call(os.getpid) == os.getpid()
    assert started.call(os.getpid) == os.getpid()


def n_threads() -> set[int]:
    """The threads that torch, OpenMP and the products of NumPy have here."""
    return {torch.get_num_threads(), *(each["num_threads"] for each in threadpool_info())}


def test_a_process_computes_with_one_thread_whatever_this_one_has(running: Processes) -> None:
    assert running.call(n_threads) == {1}


def test_processes_that_start_early_are_those_of_the_context(unprepared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    with starting_early(1):
        processes = Processes.of_context()
        assert len(processes) == 1
        assert Processes.of_context() is processes
    assert processes.call(os.getpid) != os.getpid(), "they are left to whom they were given"
    with starting_early(0):
        assert len(Processes.of_context()) == 0
    assert Processes.of_context() is not processes


def test_processes_that_nobody_took_end_with_the_context(unprepared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    ended: list[int] = []
    monkeypatch.setattr(
        "tlcapture.runs.processes._end", lambda processes: (ended.append(len(processes)), _end(processes))
    )
    with pytest.raises(RuntimeError), starting_early(1):
        raise RuntimeError
    gc.collect()
    assert ended == [1]


@pytest.mark.parametrize(
    ("n_processes", "n_weights", "expected"), [(1, 300_000, 1), (1, 100_000_000, 2), (0, 300_000, 2), (5, 300_000, 1)]
)
def test_a_small_model_leaves_processors_to_the_processes_beside_it(
    n_processes: int, n_weights: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.runs.processes.n_processors", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with leaving_processors(n_processes, n_weights):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_few_prompts_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLCAPTURE_PROCESSES", raising=False)
    processes = Processes()
    processes.announce(1)
    assert not processes
    assert processes.call(os.getpid) == os.getpid()


_PROGRAM = """
import os, time
from tlcapture.runs.processes import Processes
processes = Processes()
processes.announce(1)
print(processes.call(os.getpid), flush=True)
open("again", "a").write("x")
time.sleep(60)
"""


def test_processes_end_with_a_killed_parent_whose_script_they_do_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_PROGRAM)  # without a guard of its main part
    environment = {**os.environ, "TLCAPTURE_PROCESSES": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    time.sleep(0.1)
    parent.kill()
    parent.communicate()
    for _ in range(1000):
        if not Path(f"/proc/{number}").exists() or " Z " in Path(f"/proc/{number}/stat").read_text():
            break
        time.sleep(0.01)
    else:
        raise AssertionError("the process goes on")
    assert (tmp_path / "again").read_text() == "x"


def test_a_folder_whose_files_are_named_as_modules_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pickle", "queue", "tlcapture", "torch"):
        (tmp_path / f"{name}.py").write_text("open('was_run', 'w')\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    processes = Processes()
    processes.announce(1)
    assert processes.call(os.getpid) != os.getpid()
    assert not (tmp_path / "was_run").exists()


def test_a_process_finds_the_modules_that_an_interactive_session_finds_in_its_folder(
    unprepared: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def answer():\n    return 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    processes = Processes()
    processes.announce(1)
    assert processes.call(__import__("only_here").answer) == 42
    assert processes._started[0].is_usable


def test_without_a_program_to_start_the_work_is_done_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "2")
    monkeypatch.setattr(sys, "executable", "")  # of a program that embeds Python
    processes = Processes()
    for _ in range(2):
        processes.announce(1)
        assert processes.call(os.getpid) == os.getpid()
    assert len(caplog.records) == 1


def test_where_other_processes_are_still_starting_no_call_waits_for_the_one_that_is_ready(
    unprepared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        is_usable, is_starting = True, False

        def call(self, function: Callable[..., int], *args: object) -> int:
            return processes.call(os.getpid)  # while this process is busy

    ready, starting = Fake(), Fake()
    starting.is_usable, starting.is_starting = False, True
    processes = Processes()
    monkeypatch.setattr(processes, "_started", [ready, starting])
    processes._free.put(ready)  # type: ignore[arg-type]
    assert processes.call(os.getpid) == os.getpid()


def test_an_interrupted_call_leaves_its_answer_to_no_other(started: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started.call(abs, -1) == 1

    def interrupted(file: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tlcapture.runs.processes.pickle.load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started.call(abs, -2)
    assert started.call(abs, -3) == 3


def test_the_work_of_a_process_that_cannot_be_made_ready_is_done_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    monkeypatch.setattr("tlcapture.runs.processes._prepare", len)  # which needs a value, as if a module were missing
    processes = Processes()
    processes.announce(1)
    assert processes.call(os.getpid) == os.getpid()
    assert [record.getMessage() for record in caplog.records] == [
        "a process that writes files did not start: len() takes exactly one argument (0 given)"
    ]


def test_a_run_that_ends_early_does_not_wait_for_processes_to_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    processes = Processes()
    processes.announce(1)
    (process,) = processes._started
    _end(processes._started)
    assert process._popen.returncode == -signal.SIGKILL
    assert processes.call(os.getpid) == os.getpid()  # once whoever waited for its start has given up
    assert not caplog.records


def test_a_process_that_does_not_end_is_killed(started: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.runs.processes._PATIENCE", 0.05)
    os.kill(started.call(os.getpid), signal.SIGSTOP)
    _end(started._started)
    assert started._started[0]._popen.returncode == -signal.SIGKILL


def test_a_process_that_waits_for_work_ends_by_itself(running: Processes) -> None:
    running.call(os.getpid)
    _end(running._started)
    assert running._started[0]._popen.returncode == 0
