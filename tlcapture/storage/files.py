"""Writing and reading files: the only module that does.

A file is written beside its place and renamed into it, so it is whole or absent. `.pt` files hold
tensors and plain Python values and are opened without running any code of theirs, memory-mapped, so
that opening costs nothing until a tensor is touched.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tlcapture.errors import NoSpaceError, StorageError
from tlcapture.logger import get_logger
from tlcapture.storage.archives import Archive
from tlcapture.text import format_bytes

_log = get_logger(__name__)
# After these nothing more can be written in the same place, whatever it is.
_FOR_ALL_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Where a process number means something: this machine, or the container on it.
_HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
with suppress(OSError):
    _HOST += f"-{os.stat('/proc/self/ns/pid').st_ino}"
_TEMPORARY = re.compile(rf"\..+\.{re.escape(_HOST)}\.(\d+)\.[0-9a-f]+\.tmp")


Hook = Callable[[Path], object]


class Written(NamedTuple):
    """A file that was written, and its size in bytes."""

    path: Path
    size: int


def write_json(path: Path, value: Any, *, indent: bool = False) -> Written:
    """Write `value` (plain values and C-contiguous numpy arrays) as UTF-8 JSON."""
    option = orjson.OPT_SERIALIZE_NUMPY | (orjson.OPT_INDENT_2 if indent else 0)
    try:
        return write_bytes(path, orjson.dumps(value, option=option))
    except orjson.JSONEncodeError as error:
        if "Recursion limit" not in str(error):
            raise
        raise StorageError(f"{path}: cannot be written: nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `StorageError` with file, line and reason."""
    data = read_bytes(path)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise StorageError(f"{path}: line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}") from None
    except RecursionError:
        raise StorageError(f"{path}: no valid JSON: nested too deeply") from None


def write_bytes(path: Path, data: bytes, *, before_replacing: Hook = lambda new: None) -> Written:
    """Write `data`. `before_replacing` is called with the new file when that is whole and not yet in its place."""
    return _write(path, lambda temporary: temporary.write_bytes(data), len(data), before_replacing)


def read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise StorageError(f"{path}: cannot be read: expected a file")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None


def write_tensors(path: Path, value: Any, *, before_replacing: Hook = lambda new: None) -> Written:
    """`torch.save` tensors and plain values.

    `before_replacing` is called with the new file when that is whole and not yet in its place.

    Tensors that are views of one storage are written as one. A view of a larger storage would drag
    all of it along: callers hand over clones of exactly what is to be kept.
    """
    import torch

    def write(temporary: Path) -> None:
        # Through a file of Python's, whose errors say what is wrong; torch's own say only that something is.
        with temporary.open("wb") as file:
            torch.save(value, file)

    return _write(path, write, sum(_storages(value).values()), before_replacing)


def read_tensors(path: Path) -> Any:
    """Open a `.pt` file memory-mapped, refusing any that holds more than tensors and plain values."""
    import torch

    with opening(path):
        sizes = Archive(path).sizes
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # torch maps tensors without a look at how long what is stored of them is.
        if Counter(_storages(value).values()) - sizes:
            raise ValueError("its tensors have other sizes than what is stored of them")
        return value


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn every way in which a tensor file can be wrong into a `StorageError` of one line.

    It is opened by its name several times: one in whose place another comes meanwhile is refused too.
    """
    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    try:
        before = _identity(path)
        yield
        if _identity(path) != before:
            raise StorageError(f"{path}: another file came in its place while it was being opened: open it again")
    except StorageError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in reason:
            reason = "it holds more than tensors and plain values, and is not opened for safety"
        raise StorageError(f"{path}: cannot be read as a tensor file: {reason}") from None


def remove(paths: Iterable[Path]) -> int:
    """Remove files that exist; returns how many there were."""
    count = 0
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()
            count += 1
    return count


def sweep_temporaries(folder: Path) -> None:
    """Remove what killed runs of this machine left half-written below `folder`: temporaries whose
    process is gone. Those of other machines that share the folder are theirs to remove."""
    for path in list(folder.rglob(".*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: `fill` gets a temporary one, which is then renamed to `path`.

    Where another process was faster, its folder is kept.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        sweep_temporaries(path.parent)
        fill(temporary)
        with suppress(OSError):
            temporary.rename(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be made: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Free bytes of the device on which `path` lies, or would lie once its folders are made."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free


def _write(
    path: Path, write: Callable[[Path], object], needed: int, before_replacing: Hook = lambda new: None
) -> Written:
    temporary = _temporary(path)
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced
        raise StorageError(f"{path}: cannot be written: {'a folder' if path.is_dir() else 'no file'} is there")
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        before_replacing(temporary)
        size = temporary.stat().st_size
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # before the free bytes are counted
        if isinstance(error, OSError | RuntimeError):
            raise _cannot_write(path, error, needed) from None
        raise
    _log.debug("wrote %s, %s", path, format_bytes(size))
    return Written(path, size)


def _cannot_write(path: Path, error: BaseException, needed: int) -> StorageError:
    """The error for a file that could not be written. torch wraps what the file said into an error of its own."""
    cause = error if isinstance(error, OSError) else error.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    reason = os.strerror(number) if number else str(error).splitlines()[0]
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += f": it needs {format_bytes(needed)}, {format_bytes(free_bytes(path))} are free on its device"
    kind = NoSpaceError if number in _FOR_ALL_FILES else StorageError
    return kind(f"{path}: cannot be written: {reason}")


def _storages(value: Any) -> dict[int, int]:
    """Bytes of the memory that ordinary tensors within a value share or have, by where it is."""
    storages: dict[int, int] = {}
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple):
            if id(each) not in seen:  # a value may hold itself, or one value a million times
                seen.add(id(each))
                waiting += each.values() if isinstance(each, dict) else each
        elif hasattr(each, "untyped_storage") and _is_in_memory(each):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def _identity(path: Path) -> tuple[int, ...]:
    """What two files never have in common."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_in_memory(tensor: Any) -> bool:
    return str(tensor.layout) == "torch.strided" and not tensor.is_meta and tensor.numel() > 0


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _is_running(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))
