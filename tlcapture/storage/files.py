"""Writing and reading files; all other modules use this one.

A file is written to a temporary file next to its path and then renamed, so it is complete or absent. `.pt` files hold
tensors and plain Python values. They are opened without executing code from them, and memory-mapped, so that data is
only read when a tensor is used.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from tlcapture.errors import NoSpaceError, StorageError
from tlcapture.storage.archives import Archive, Buffer, MoreRecords, archive_of, storages_of
from tlcapture.storage.json_text import parsed
from tlcapture.storage.regular_files import check_regular, in_place_of_folder
from tlcapture.storage.remote.object_stores import is_url
from tlcapture.storage.remote.roots import discard, is_remote, local, publish
from tlcapture.storage.remote.working_copies import is_copy
from tlcapture.storage.temporary_files import sweep_once, temporary_path
from tlcapture.text import first_line, format_bytes

_log = logging.getLogger(__name__)
# Errors after which no other file can be written to the same device either.
FOR_ALL_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_END = 2**63
_MOST_PIECES = 1000  # that a system call writes
FSYNC = "TLCAPTURE_FSYNC"  # if set, files are on the disk when they count as written; other processes see it too


Hook = Callable[[Path], object]
_check_change: Hook = lambda path: None  # noqa: E731


class FileState(NamedTuple):
    """The state that identifies an unchanged file: its size in bytes, and the times `st_mtime_ns` and `st_ctime_ns`.

    Times are in nanoseconds since the epoch. The second one is 0 for an object in a remote root.
    """

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        """The state of a file, from its `os.stat_result`."""
        return cls(found.st_size, found.st_mtime_ns, 0 if is_copy(found) else found.st_ctime_ns)


class Written(NamedTuple):
    """A file that was written, and its size in bytes.

    `state` is its state at its path, unless another process has replaced it already; `facts` are what an index of files
    (`file_index`) holds about it, if known.
    """

    path: Path
    size: int
    state: FileState | None = None
    facts: tuple[bytes, ...] = ()

    def knowing(self, facts: tuple[bytes, ...] | None) -> Written:
        """A copy with facts about the file."""
        return self._replace(facts=facts or ())


def check_changes(check: Hook) -> None:
    """Call `check` with the path of each file before this process writes or removes it; it raises to prevent that."""
    global _check_change
    _check_change = check


@contextmanager
def fsyncing(*, asked: bool = True) -> Iterator[None]:
    """Within the context, flush each written file and its folder to the disk; also in processes started here."""
    before = os.environ.get(FSYNC)
    if asked:
        os.environ[FSYNC] = "1"
    try:
        yield
    finally:
        if asked:
            os.environ.pop(FSYNC)
            os.environ.update({} if before is None else {FSYNC: before})


def write_json(path: Path, value: Any, *, indent: bool = False) -> Written:
    """Write `value` (plain values and C-contiguous numpy arrays) as UTF-8 JSON.

    Raises:
        StorageError: the file cannot be written, or the value is nested too deeply.
    """
    option = orjson.OPT_SERIALIZE_NUMPY | (orjson.OPT_INDENT_2 if indent else 0)
    try:
        return write_bytes(path, orjson.dumps(value, option=option))
    except orjson.JSONEncodeError as error:
        if "Recursion limit" not in str(error):
            raise
        raise StorageError(f"{path}: cannot be written: nested too deeply") from None


def as_json(value: Any) -> Any:
    """A value for `write_json` that is serialised already, since several files or texts share it."""
    return orjson.Fragment(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def read_json(path: Path, *, exact: bool = False) -> Any:
    """Read a JSON file; raises `StorageError` with file, line and reason if it cannot be read or is not JSON.

    With `exact`, JSON that cannot be read without losing something is refused too; see `json_text.lost`.
    """
    return parsed(read_bytes(path), path, exact=exact)


def write_bytes(path: Path, data: bytes, *, before_replacing: Hook | None = None) -> Written:
    """Write `data` to a file.

    `before_replacing` is called with the path of the complete temporary file, before it is renamed to `path`.

    Raises:
        NoSpaceError: the device is full, over its quota or read-only.
        StorageError: the file cannot be written for another reason.
    """
    return _write_pieces(path, [data], before_replacing)


def write_stream(path: Path, write: Callable[[IO[bytes]], object], n_bytes: int) -> Written:
    """Write a file of `n_bytes` by a function that gets it open; otherwise as `write_bytes`."""

    def write_all(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    return _write(path, write_all, n_bytes)


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises `StorageError` if it cannot be read or is not a regular file."""
    try:
        check_regular(path)  # reading a pipe would wait
        return local(path).read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None


def write_tensors(
    path: Path,
    value: Any,
    *,
    more: MoreRecords = lambda storages: {},
    before_replacing: Hook | None = None,
) -> Written:
    """Write tensors and plain values for `torch.load`, and further records that it ignores.

    Tensors that are views of the same storage share it in the file too. A view of a larger storage would write all of
    that storage, so callers pass clones.

    `before_replacing` is called with the path of the complete temporary file, before it is renamed to `path`.

    Raises:
        NoSpaceError: the device is full, over its quota or read-only.
        StorageError: the file cannot be written for another reason.
    """
    return _write_pieces(path, archive_of(value, more), before_replacing)


def read_tensors(path: Path, *, records: Sequence[str] = (), whole: bool = True) -> Any:
    """Open a `.pt` file memory-mapped; raises `StorageError` if it has anything but tensors and plain values.

    Where the `whole` file will be used, its tensors are read and compared with their checksums.

    Objects of the classes named in `records`, such as `package.module.Name`, are read as dicts of their attributes; the
    classes themselves are neither imported nor called.
    """
    import torch

    allowed = [(_record(name), name) for name in records]
    with opening(path), torch.serialization.safe_globals(allowed) if allowed else nullcontext():
        archive = Archive(path)
        if whole:
            archive.check()
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # torch maps tensors without checking the size of their records.
        if Counter(storages_of(value).values()) - archive.sizes:
            raise ValueError("the sizes of its tensors do not match those of its records")
        return value


def _record(name: str) -> type:
    """A new class that takes the place of the class `name` of another package."""
    return type(name.rpartition(".")[2], (dict,), {"__setstate__": lambda self, state: self.update(state)})


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn any error while a tensor file is opened into a `StorageError` with a message of one line.

    The file is opened by its path several times, so replacing it in between is an error too.
    """
    check_regular(path)
    if not path.is_file():
        hint = ": open it as a capture of its experiment, Experiment(NAME, root=URL)" if is_url(path) else ""
        raise StorageError(f"{path}: no such file{hint}")
    try:
        before = _identity(local(path))
        yield
        if _identity(path) != before:
            raise StorageError(f"{path}: the file was replaced while it was being opened: open it again")
    except StorageError:
        raise
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values, and is not opened for safety"
        raise StorageError(f"{path}: cannot be read as a tensor file: {reason}") from None


def remove(paths: Iterable[Path]) -> int:
    """Remove the files that exist; returns how many. Raises `StorageError` where one cannot be removed."""
    count = 0
    for path in paths:
        _check_change(path)
        discard(path)
        try:
            path.unlink()
            count += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(f"{path}: cannot be removed: {error.strerror}") from None
    return count


def free_bytes(path: Path) -> int:
    """Free bytes on the device of `path`, or of its nearest parent folder that exists; unlimited in a remote root."""
    return _NO_END if is_remote(path) else _free_here(path)


def _free_here(path: Path) -> int:
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free


def _write_pieces(path: Path, pieces: Sequence[Buffer], before_replacing: Hook | None = None) -> Written:
    return _write(path, lambda temporary: _write_new(temporary, pieces), sum(map(len, pieces)), before_replacing)


def _write_new(path: Path, pieces: Sequence[Buffer]) -> None:
    """Write a file from pieces, with as few system calls as possible: after each, a thread waits for the GIL."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        left = [memoryview(piece) for piece in pieces if len(piece)]
        while left:
            n_written = os.writev(descriptor, left[:_MOST_PIECES])
            while left and n_written >= len(left[0]):
                n_written -= len(left.pop(0))
            if n_written:
                left[0] = left[0][n_written:]
    finally:
        os.close(descriptor)


def _write(path: Path, write: Callable[[Path], object], n_bytes: int, before_replacing: Hook | None = None) -> Written:
    """Write a file of `n_bytes` by a function that gets a temporary path."""
    _check_is_file(path)  # the rename would replace a device or a pipe
    sweep_once(path.parent)  # which may also free the space that it needs
    temporary = temporary_path(path)
    try:
        try:
            write(temporary)
        except FileNotFoundError:
            _make_folder(path.parent)
            write(temporary)
        _sync(temporary)
        _check_change(path)
        if before_replacing is not None:
            before_replacing(temporary)
        new = os.stat(temporary)
        if publish(temporary, path):
            new = os.lstat(path)  # of the uploaded object
        else:
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # before free space is measured for the message
        if isinstance(error, OSError):
            raise _cannot_write(path, error, n_bytes) from None
        raise
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("wrote %s, %s", path, format_bytes(new.st_size))
    return Written(path, new.st_size, _state_of(path, new))


def _check_is_file(path: Path) -> None:
    """Raise `StorageError` for anything that exists but is not a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise StorageError(f"{path}: cannot be written: it is {found}")


def _state_of(path: Path, written: os.stat_result) -> FileState | None:
    """The state of a file at its path, if it is the one that was written."""
    with suppress(OSError):
        found = os.lstat(path)
        if _unchanged(found) == _unchanged(written):
            return FileState.of(found)
    return None


def _unchanged(found: os.stat_result) -> tuple[int, int, int]:
    """The properties that a rename does not change."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _make_folder(folder: Path) -> None:
    new = [each for each in [folder, *folder.parents] if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        _sync(each.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, if that is asked for."""
    if not os.environ.get(FSYNC):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError, n_bytes: int) -> StorageError:
    """The error for a file of `n_bytes` that could not be written."""
    reason = os.strerror(error.errno) if error.errno else first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += f": it needs {format_bytes(n_bytes)}, {format_bytes(_free_here(path))} are free on its device"
    kind = NoSpaceError if error.errno in FOR_ALL_FILES else StorageError
    return kind(f"{path}: cannot be written: {in_place_of_folder(path.parent) or reason}")


def _identity(path: Path) -> tuple[int, ...]:
    """Properties that together identify a file and its content."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
