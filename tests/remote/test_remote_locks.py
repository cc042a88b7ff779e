"""Locks in an object store."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tlcapture.runs.display import Display
from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.locks import locked
from tlcapture.storage.remote import locks as remote_locks
from tlcapture.storage.remote import roots as remote_roots
from tlcapture.storage.remote.object_stores import Store
from tlcapture.storage.remote.roots import root_folder, store_of
from tlcapture.storage.remote.working_copies import HOST


class Lines(Display):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def layout(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(remote_locks, "_POLL", 0.05)
    return Layout(root_folder(bucket), "exp")


def hold(layout: Layout, **changes: Any) -> tuple[Store, str]:
    """Have another process hold the lock of `captures of set`."""
    store, name = store_of(layout.lock("captures-of-set")) or (None, "")
    assert store is not None
    held = {**json.loads(remote_locks.Holder().to_json()), "host": "node7", "process": 4711, "user": "ann", **changes}
    assert store.create(name, json.dumps(held).encode())
    return store, name


def test_of_two_writers_one_waits_and_says_for_whom(layout: Layout) -> None:
    store, name = hold(layout, since="2026-11-26T10:00:00+00:00")
    display = Lines()
    threading.Timer(0.5, store.remove, [name]).start()
    began = time.monotonic()
    with run_lock(Run(layout, Run.silent(layout).report, display), "captures of set") as waited:
        assert waited
        assert time.monotonic() - began > 0.4
        held = json.loads(store.read(name) or b"")
        assert (held["host"], held["process"]) == (HOST, remote_locks.os.getpid())
    assert store.read(name) is None
    assert display.lines == [
        "another run is writing captures of set in exp (process 4711 of ann on node7, since "
        "2026-11-26T10:00:00+00:00): waiting for it to end"
    ]


def test_many_threads_hold_a_lock_one_at_a_time(layout: Layout) -> None:
    inside, most, n = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with locked(layout.lock("captures-of-set")):
            with n:
                inside, most = inside + 1, max(most, inside + 1)
            time.sleep(0.02)
            with n:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == 1


def test_the_lock_of_a_process_of_this_machine_that_was_killed_is_taken_over_at_once(layout: Layout) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    store, name = hold(layout, host=HOST, process=dead.pid)
    began = time.monotonic()
    with locked(layout.lock("captures-of-set")) as waited:
        assert not waited
        assert json.loads(store.read(name) or b"")["process"] == remote_locks.os.getpid()
    assert time.monotonic() - began < 5


def test_a_lock_that_its_holder_keeps_is_not_taken_and_one_that_is_not_kept_is(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_locks, "_STALE", 0.6)
    monkeypatch.setattr(remote_locks, "_BEAT", 0.1)
    order: list[str] = []

    def second() -> None:
        with locked(layout.lock("captures-of-set")):
            order.append("second")

    with locked(layout.lock("captures-of-set")):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(1.5)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    hold(layout)
    second()
    assert order[2:] == ["second"]


def test_of_two_runs_that_find_a_stale_lock_one_takes_it(layout: Layout) -> None:
    store, name = hold(layout)
    found = remote_locks.held(store, name)
    assert found is not None
    assert store.replace(name, remote_locks.Holder().to_json(), found[1])
    assert not store.replace(name, remote_locks.Holder().to_json(), found[1])
    store.remove(name)
    assert not store.replace(name, remote_locks.Holder().to_json(), found[1])


def test_a_lock_that_was_taken_away_is_not_given_back(layout: Layout) -> None:
    path = layout.lock("captures-of-set")
    with locked(path):
        store, name = store_of(path) or (None, "")
        assert store is not None
        store.remove(name)
        hold(layout)
    assert json.loads(store.read(name) or b"")["user"] == "ann"


def test_shards_run_together_and_a_run_of_all_waits_for_them(layout: Layout) -> None:
    display = Lines()
    run = Run(layout, Run.silent(layout).report, display)
    with run_lock(run, "captures of set", PromptShare(1, 2)), run_lock(run, "captures of set", PromptShare(2, 2)):
        assert display.lines == []
        ended = threading.Event()

        def whole() -> None:
            with run_lock(run, "captures of set") as waited:
                assert waited
                ended.set()

        thread = threading.Thread(target=whole)
        thread.start()
        assert not ended.wait(0.5)
    thread.join()
    assert ended.is_set()
    assert "waiting for it to end" in display.lines[0]


def test_what_the_other_run_wrote_is_there_after_waiting(layout: Layout) -> None:
    store, name = hold(layout)
    store.create("experiments/exp/runs/1.json", b"{}")
    threading.Timer(0.3, store.remove, [name]).start()
    with locked(layout.lock("captures-of-set")):
        assert layout.run_record("1").exists()


def test_something_else_where_a_lock_should_be_is_named(layout: Layout) -> None:
    store, name = store_of(layout.lock("captures-of-set")) or (None, "")
    assert store is not None
    store.create(name, b"[]")
    refused = pytest.raises(remote_locks.StorageError, match=r"captures-of-set.lock: not a lock: remove it")
    with refused, locked(layout.lock("captures-of-set")):
        pass


def test_a_store_without_conditional_writes_is_said_once(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Store.create

    def without_condition(self: Store, name: str, data: bytes) -> bool:
        self.remove(name)
        return create(self, name, data)

    monkeypatch.setattr(Store, "create", without_condition)
    display = Lines()
    for _ in range(2):
        run = Run.begin(layout, display)
    assert run.report.warnings == display.lines[:1]
    assert "has no conditional writes, so runs do not wait for each other" in display.lines[0]


def test_a_store_that_refuses_conditions_is_written_to_without(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    call = s3fs.S3FileSystem._call_s3

    async def refuse(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if "IfNoneMatch" in kwargs:
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
    display = Lines()
    run = Run.begin(layout, display)
    assert "has no conditional writes" in display.lines[0]
    with run_lock(run, "captures of set") as waited:
        assert not waited


def test_a_store_that_cannot_be_written_to_is_refused_before_the_work(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(self: Any, *args: Any, **kwargs: Any) -> None:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(store_of(layout.folder)[0]._fs), "_pipe_file", deny)  # type: ignore[index]
        with suppress(AttributeError):
            patch.setattr(store_of(layout.folder)[0]._fs, "pipe_file", lambda *a, **k: deny(None))  # type: ignore[index]
        with pytest.raises(remote_locks.StorageError, match=r"may not be written with these credentials"):
            Run.begin(layout, Lines())


def test_beginning_a_run_leaves_nothing_behind(layout: Layout, s3: Any, bucket: str) -> None:
    Run.begin(layout, Lines())
    assert s3.find(bucket) == []


def test_local_locks_are_as_before(tmp_path: Path) -> None:
    assert remote_roots.store_of(tmp_path) is None
    with locked(tmp_path / "x.lock") as waited:
        assert not waited
    assert (tmp_path / "x.lock").exists()
