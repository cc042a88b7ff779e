"""A lock is held by one process at a time, and is released when its process ends."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tlcapture.errors import StorageError
from tlcapture.storage.locks import is_held, locked

HOLD = """
import pathlib, sys, time
from tlcapture.storage.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_second_process_waits_and_is_notified_once(tmp_path: Path) -> None:
    path, waits = tmp_path / "new" / "x.lock", []
    with locked(path) as waited:
        assert not waited
    holder = hold(path, 0.7)
    began = time.monotonic()
    with locked(path, lambda: waits.append(1)) as waited:
        assert waited
    assert time.monotonic() - began > 0.1
    assert waits == [1]
    assert holder.wait() == 0


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    holder = hold(path, 60)
    holder.kill()
    holder.wait()
    with locked(path) as waited:
        assert not waited


def test_the_error_names_a_path_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/x\.lock: cannot be locked: "), locked(tmp_path / "file" / "x.lock"):
        raise AssertionError("it was locked")


def test_a_file_system_without_locks_is_used_without_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    def acquire(*args: object, **options: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with locked(tmp_path / "x.lock") as waited:
        assert not waited


def test_whether_a_lock_is_held_can_be_asked_by_several_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    assert not is_held(path)
    with locked(path):
        assert is_held(path)
    path.touch()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another one that asks
        assert not is_held(path)
    holder = hold(path, 60)
    assert is_held(path)
    holder.kill()
    holder.wait()
    assert not is_held(path)
