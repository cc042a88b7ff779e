"""Promises 5 and 6: files are complete or absent, and opening one executes no code."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path

import pytest
import torch

from tlcapture.captures.capture import common_dtype
from tlcapture.errors import NumericalError, StorageError
from tlcapture.storage import archives, files
from tlcapture.storage.files import read_json, read_tensors, write_bytes, write_json, write_tensors
from tlcapture.storage.temporary_files import remove_temporaries, sweep_temporaries, temporary_path, writer
from tlcapture.storage.whole_folders import write_folder


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_tensors_and_plain_values_are_read_back_and_views_are_written_once(tmp_path: Path) -> None:
    buffer = torch.randn(4, 1000)
    path = tmp_path / "a" / "x.pt"
    size = write_tensors(path, {"views": [buffer[0], buffer[1], buffer[2], buffer[3], buffer[3]], "text": "é"}).size
    assert size == path.stat().st_size
    assert size < buffer.nbytes + 4000
    value = read_tensors(path)
    assert torch.equal(torch.stack(value["views"][:4]), buffer)
    assert value["text"] == "é"


def test_advice_about_activations_that_are_not_finite_names_the_model() -> None:
    with pytest.raises(NumericalError, match=r"hold NaN or inf: .* run 'tlcapture doctor --model my-model'"):
        common_dtype([torch.tensor([1.0, torch.nan])], "auto", "my-model")


def test_a_row_is_stored_as_the_tensor_of_that_row(tmp_path: Path) -> None:
    for kind in (torch.randn(3, 4, 2).half(), torch.randn(4, 5).T, torch.randn(2, 3, requires_grad=True)):
        for number in range(len(kind)):
            write_tensors(tmp_path / "tensors.pt", {"a": kind[number], "b": [kind[0]]})
            write_tensors(tmp_path / "rows.pt", {"a": archives.Row(kind, number), "b": [archives.Row(kind, 0)]})
            assert (tmp_path / "rows.pt").read_bytes() == (tmp_path / "tensors.pt").read_bytes()


def test_a_file_is_written_whole_by_system_calls_that_write_less_than_they_are_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MOST_PIECES", 2)
    written: list[int] = []

    def writev(descriptor: int, pieces: list[memoryview]) -> int:
        written.append(os.write(descriptor, b"".join(pieces)[:5]))
        return written[-1]

    monkeypatch.setattr(os, "writev", writev)
    files._write_new(tmp_path / "x", [b"ab", b"", b"cdefgh", b"i", b"jklmnopqrst", b"u"])
    assert (tmp_path / "x").read_bytes() == b"abcdefghijklmnopqrstu"
    assert len(written) > 4


@pytest.mark.parametrize("largest", [2**31, 64])  # a record that needs 64-bit sizes would have gigabytes
def test_archives_hold_what_torch_save_writes_and_are_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(archives, "_LARGEST", largest)
    buffer = torch.randn(3, 7)
    value = {
        "views": {0: buffer[0], 1: buffer[1:], 2: buffer.T},
        "half": torch.randn(5).bfloat16(),
        "none": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "flags": torch.tensor([True, False]),
        "float8": torch.ones(4).to(torch.float8_e4m3fn),
        "same": [buffer, "é", None, 2**40, (1.5, b"x")],
    }
    write_tensors(tmp_path / "ours.pt", value)
    torch.save(value, tmp_path / "theirs.pt")
    with zipfile.ZipFile(tmp_path / "ours.pt") as ours, zipfile.ZipFile(tmp_path / "theirs.pt") as theirs:
        assert ours.testzip() is None  # every checksum is right
        names = [each.filename.partition("/")[2] for each in ours.infolist()]
        assert names == [each.filename.partition("/")[2] for each in theirs.infolist()][: len(names)]
        for name in names:
            assert ours.read(f"archive/{name}") == theirs.read(f"theirs/{name}"), name
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mmap)
        assert str(loaded) == str(value)
        assert loaded["views"][0].data_ptr() == loaded["same"][0].data_ptr()
    assert loaded["half"].data_ptr() % 64 == 0 or largest == 64


def test_memory_of_what_was_written_is_released_at_once(tmp_path: Path) -> None:
    tensor = torch.randn(10)
    storage = weakref.ref(tensor.untyped_storage())
    gc.disable()
    try:
        write_tensors(tmp_path / "x.pt", {"x": tensor})
        del tensor
        assert storage() is None
    finally:
        gc.enable()


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    torch.save({"x": Harmful(harmed)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harmful(harmed)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(StorageError, match=f"{name}: cannot be read as a tensor file"):
            read_tensors(tmp_path / name)
    assert not harmed.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 2000])
def test_a_truncated_tensor_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.pt"
    write_tensors(path, {"x": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"x\.pt: cannot be read"):
        read_tensors(path)


def test_a_folder_where_a_file_is_expected_is_an_error(tmp_path: Path) -> None:
    for read in (read_tensors, read_json):
        with pytest.raises(StorageError, match="expected a file, found a folder: move it"):
            read(tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        write_bytes(tmp_path, b"x")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(StorageError):
        write_tensors(tmp_path / "x.json" / "below.pt", {})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_killed_writer_leaves_complete_files_and_its_temporaries_are_removed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from tlcapture.storage.files import write_bytes\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    write_bytes(pathlib.Path(sys.argv[1]) / f'{number % 3}.bin', bytes([number % 256]) * 20_000_000)\n"
    )
    for delay in (0.3, 0.35, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("*.bin")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        files = list(tmp_path.glob("*.bin"))
        assert files
        for path in files:
            data = path.read_bytes()
            assert len(data) == 20_000_000
            assert data == data[:1] * len(data)
        sweep_temporaries(tmp_path)
        assert not list(tmp_path.glob(".*"))


def test_the_temporary_name_of_a_long_name_is_as_long_as_a_name_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + "x" * 10)
    assert 253 <= len(os.fsencode(temporary_path(path).name)) <= 255
    assert write_bytes(path, b"x").size == 1
    gone = temporary_path(path).name.replace(f".{os.getpid()}.", ".99999999.")
    (tmp_path / gone.replace("é", "", 10)).touch()
    sweep_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_temporaries_of_running_processes_and_other_machines_are_kept(tmp_path: Path) -> None:
    mine, elsewhere = temporary_path(tmp_path / "x.pt"), tmp_path / ".x.pt.another-host.99999999.0a1b.tmp"
    gone = tmp_path / mine.name.replace(str(os.getpid()), "99999999")
    for path in (mine, elsewhere, gone):
        path.touch()
    sweep_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])


def test_the_first_write_to_a_folder_removes_what_a_killed_process_left_there(tmp_path: Path) -> None:
    mine = temporary_path(tmp_path / "x.pt")
    gone = [tmp_path / mine.name.replace(f".{os.getpid()}.", f".{number}.") for number in (99999998, 99999999)]
    gone[0].touch()
    write_bytes(tmp_path / "a", b"")
    gone[1].touch()
    write_bytes(tmp_path / "b", b"")
    assert sorted(tmp_path.iterdir()) == [gone[1], tmp_path / "a", tmp_path / "b"]  # it is looked for once


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "e", lambda folder: (folder / "one").touch())
    rename = Path.rename

    def refuse(path: Path, target: Path) -> None:
        if target == tmp_path / "e" and (path / "two").exists():
            raise OSError(errno.EIO, "Input/output error")
        rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match=r"e: cannot be created: Input/output error"):
        write_folder(tmp_path / "e", lambda folder: (folder / "two").touch(), replaces=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["e", "e/one"]


def test_temporaries_of_a_writer_are_removed_everywhere_even_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    kept, folder = tmp_path / ".x.pt.another-host.1.0a1b.tmp", temporary_path(tmp_path / "a" / "model")
    folder.mkdir()
    for path in (kept, folder / "part", temporary_path(tmp_path / "x.pt"), temporary_path(tmp_path / "a/b/y.json")):
        path.touch()
    remove_temporaries(tmp_path, [writer()])
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path == folder] == [kept]


def test_a_temporary_of_a_process_that_has_ended_is_removed_before_anybody_waits_for_it(tmp_path: Path) -> None:
    """A container without an init process keeps such processes for good."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    own = temporary_path(tmp_path / "x.pt")
    (tmp_path / own.name.replace(f".{os.getpid()}.", f".{ended.pid}.")).touch()
    (tmp_path / own.name.replace(f".{os.getpid()}.", f".{10**30}.")).touch()  # no process has that number
    sweep_temporaries(tmp_path)
    assert not list(tmp_path.iterdir())
    ended.wait()


def test_folders_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    (tmp_path / "target").write_bytes(b"x")
    link.symlink_to(tmp_path / "target")
    for path in (pipe, folder):
        with pytest.raises(StorageError, match=r"cannot be written: it is (a folder|not a regular file)"):
            write_bytes(path, b"new")
    assert pipe.is_fifo() and folder.is_dir()
    write_bytes(link, b"new")
    assert link.read_bytes() == b"new"
    assert not list(tmp_path.glob(".*"))
