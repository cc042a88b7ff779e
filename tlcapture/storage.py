"""Writing and reading files: the only module that does.

A file is written beside its place and renamed into it, so it is whole or absent. `.pt` files hold
tensors and plain Python values and are opened without running any code of theirs, memory-mapped, so
that opening costs nothing until a tensor is touched.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from tlcapture.errors import StorageError

_HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
_TEMPORARY = re.compile(rf"\..+\.{re.escape(_HOST)}\.(\d+)\.[0-9a-f]+\.tmp")


def write_json(path: Path, value: Any, *, indent: bool = False) -> int:
    """Write `value` (plain values and C-contiguous numpy arrays) as UTF-8 JSON; returns the bytes written."""
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


def write_bytes(path: Path, data: bytes) -> int:
    """Write `data`; returns its length."""
    return _write(path, lambda temporary: temporary.write_bytes(data))


def read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise StorageError(f"{path}: cannot be read: expected a file")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None


def write_tensors(path: Path, value: Any, *, before_replacing: Callable[[], object] = lambda: None) -> int:
    """`torch.save` tensors and plain values; returns the bytes written.

    `before_replacing` is called when the new file is whole and not yet in its place.

    Tensors that are views of one storage are written as one. A view of a larger storage would drag
    all of it along: callers hand over clones of exactly what is to be kept.
    """
    import torch

    return _write(path, lambda temporary: torch.save(value, temporary), before_replacing)


def read_tensors(path: Path) -> Any:
    """Open a `.pt` file memory-mapped, refusing any that holds more than tensors and plain values."""
    import torch

    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # every way in which a foreign file can be wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in reason:
            reason = "it holds more than tensors and plain values, and is not opened for safety"
        raise StorageError(f"{path}: cannot be read as a tensor file: {reason}") from None


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that torch would map as it lies in the file although that is not what was stored."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise ValueError("it is a TorchScript program")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its tensors are compressed")


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


def _write(path: Path, write: Callable[[Path], object], before_replacing: Callable[[], object] = lambda: None) -> int:
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        size = temporary.stat().st_size
        before_replacing()
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(f"{path}: cannot be written: {reason}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return size


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
