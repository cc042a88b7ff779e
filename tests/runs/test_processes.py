"""Work in other Python processes: the same results, errors and files, also where a process does not last."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tlcapture.runs.processes import Processes


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Processes:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    processes = Processes()
    processes.announce(1)
    return processes


def test_results_and_errors_are_those_of_the_function(started: Processes) -> None:
    assert started.call(os.getpid) != os.getpid()
    assert started.call(math.hypot, 3.0, 4.0) == 5.0
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        started.call(math.sqrt, -1.0)
    assert started.call(math.sqrt, 4.0) == 2.0


def test_the_work_of_a_process_that_was_killed_is_done_here(started: Processes) -> None:
    os.kill(started.call(os.getpid), signal.SIGKILL)
    assert started.call(os.getpid) == os.getpid()
    assert started.call(os.getpid) == os.getpid()


def test_few_prompts_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLCAPTURE_PROCESSES", raising=False)
    processes = Processes()
    processes.announce(1)
    assert not processes._started
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


def test_processes_import_what_their_parent_does_and_not_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tlcapture.py", "torch.py"):
        (tmp_path / name).write_text("raise RuntimeError('of the current folder')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    processes = Processes()
    processes.announce(1)
    assert processes.call(os.getpid) != os.getpid()
