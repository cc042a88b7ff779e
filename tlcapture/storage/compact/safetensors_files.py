"""Safetensors files: written tensor by tensor in pieces, and read memory-mapped after a check of their header.

    write_safetensors(path, {"scores": TensorSpec("F32", (3, 2))}, {"about": "..."}, {"scores": [piece, piece]})
    TensorFile.open(path).array("scores")      # [3, 2], read from the disk where it is used

Nothing needs the whole file in memory. A header has 8 bytes for its length, and JSON: `__metadata__`, texts by name,
and for each tensor its dtype, shape, and the bytes where it begins and ends. The text `crc32` of the metadata has the
CRC-32 of the header (with zeros in place of this text) and of each tensor, in 8 digits each. Loads no torch.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tlcapture.errors import StorageError
from tlcapture.storage.files import Written, write_stream
from tlcapture.storage.regular_files import check_regular
from tlcapture.storage.remote.roots import local

_DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_MOST_HEADER = 2**26  # bytes; a longer one is not parsed
_LENGTH = 8  # bytes that state the header's length
_METADATA = "__metadata__"
CHECKSUM = "crc32"

Pieces = Iterable[NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor in a file; the dtype has a name of the format: `U8`, `I32`, `I64`, `F16` ..."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """The size of the tensor."""
        return prod(self.shape) * self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype in numpy, little-endian."""
        return np.dtype(_DTYPES[self.dtype])


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    pieces: Mapping[str, Pieces],
) -> Written:
    """Write tensors in the order of `specs`, each from pieces of its rows, which are made one at a time.

    Raises:
        NoSpaceError: the device is full, over its quota or read-only.
        StorageError: the file cannot be written for another reason, or its header would be too long to be read.
        ValueError: the pieces of a tensor do not have its size together.
    """
    no_sums = _as_text([0] * (1 + len(specs)))
    head = _header(specs, {CHECKSUM: no_sums, **metadata})
    if len(head) > _MOST_HEADER:
        raise StorageError(f"{path}: cannot be written: its header would have {len(head)} bytes, over {_MOST_HEADER}")

    def write(file: IO[bytes]) -> None:
        file.write(len(head).to_bytes(_LENGTH, "little") + head)
        sums = [zlib.crc32(head)]
        for name, spec in specs.items():
            n_written, checksum = 0, 0
            for piece in pieces[name]:
                data = np.ascontiguousarray(piece, dtype=spec.numpy).reshape(-1).view(np.uint8).data
                n_written, checksum = n_written + file.write(data), zlib.crc32(data, checksum)
            if n_written != spec.n_bytes:
                raise ValueError(f"{name}: {n_written} bytes, but its shape {list(spec.shape)} has {spec.n_bytes}")
            sums.append(checksum)
        file.seek(_LENGTH + head.index(no_sums.encode()))
        file.write(_as_text(sums).encode())

    n_bytes = _LENGTH + len(head) + sum(spec.n_bytes for spec in specs.values())
    return write_stream(path, write, n_bytes)


def _as_text(sums: Iterable[int]) -> str:
    return " ".join(f"{each:08x}" for each in sums)


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {_METADATA: dict(metadata)}
    start = 0
    for name, spec in specs.items():
        stop = start + spec.n_bytes
        content[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    head = orjson.dumps(content)
    return head + b" " * (-(len(head) + _LENGTH) % 64)  # so that tensors are aligned


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A file's metadata and the specs of its tensors, which are read when they are used. Holds no open file.

    `_starts` are the places of the tensors after the header, `_sums` their checksums, which files of earlier versions
    and of other programs lack. `_state` tells whether the file at the path is still the same.
    """

    path: Path
    metadata: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    _data: int  # where the header ends
    _starts: Mapping[str, int]
    _sums: Mapping[str, int]
    _state: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header and the size of a file.

        Raises:
            StorageError: it cannot be read, is not a safetensors file, is cut off, or its header is too long.
        """
        try:
            check_regular(path)  # reading a pipe would wait
            with local(path).open("rb") as file:
                state = _state_of(file)
                size = state[0]
                if size < _LENGTH:
                    raise _damaged(path, f"it has {size} bytes")
                length = int.from_bytes(file.read(_LENGTH), "little")
                if not 2 <= length <= min(_MOST_HEADER, size - _LENGTH):
                    at_most = f"at most {_MOST_HEADER} are read"
                    raise _damaged(path, f"its header would have {length} bytes of {size}, {at_most}")
                head = file.read(length)
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        data = _LENGTH + length
        metadata, specs, starts = _checked(path, head, size - data)
        return cls(path, metadata, specs, data, starts, _sums_in(path, head, metadata, list(specs)), state)

    def array(self, name: str) -> NDArray[Any]:
        """A tensor, memory-mapped and read-only, after it was compared with its checksum once.

        Raises `StorageError` if the file does not have it, is damaged, or is no longer the one that was opened.
        """
        if name not in self.specs:
            raise StorageError(f"{self.path}: it has no tensor {name}")
        spec = self.specs[name]
        if not spec.n_bytes:
            return np.empty(spec.shape, spec.numpy)
        try:
            with local(self.path).open("rb") as file:
                if _state_of(file) != self._state:
                    raise StorageError(f"{self.path}: the file was replaced while it was being read: open it again")
                found = np.memmap(file, spec.numpy, "r", self._data + self._starts[name], spec.shape)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror}") from None
        compared = _compared(self.path, self._state)
        if name in self._sums and name not in compared:
            if zlib.crc32(found.data) != self._sums[name]:
                raise _changed(self.path)
            compared.add(name)
        return found

    def is_whole(self) -> bool:
        """Whether the file is still there, and every tensor matches its checksum."""
        try:
            for name in self.specs:
                self.array(name)
        except StorageError:
            return False
        return True

    def check(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raise `StorageError` unless the file has a tensor with this dtype and shape."""
        found = self.specs.get(name)
        if found != TensorSpec(dtype, shape):
            has = "it has none" if found is None else f"it is {found.dtype} {list(found.shape)}"
            raise StorageError(f"{self.path}: expected a tensor {name}, {dtype} {list(shape)}: {has}")


def _state_of(file: IO[bytes]) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _checked(
    path: Path, head: bytes, n_data: int
) -> tuple[Mapping[str, str], Mapping[str, TensorSpec], Mapping[str, int]]:
    """The metadata, the tensors, and where they begin in the data, of a header that accounts for every byte of it."""
    try:
        content = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise _damaged(path, f"its header is not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, f"{_METADATA} does not hold texts by name")
    spans = {name: _spec(path, name, entry) for name, entry in content.items()}
    end = 0
    for name, (spec, start, stop) in sorted(spans.items(), key=lambda each: each[1][1:]):
        if start != end or stop - start != spec.n_bytes:
            raise _damaged(path, f"its tensor {name[:80]!r} {list(spec.shape)[:8]} cannot be bytes {start} to {stop}")
        end = stop
    if end != n_data:
        raise _damaged(path, f"its tensors have {end} bytes, but {n_data} are there: it is cut off or damaged")
    specs = {name: spec for name, (spec, _, _) in spans.items()}
    return metadata, specs, {name: start for name, (_, start, _) in spans.items()}


def _spec(path: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        is_sound = dtype in _DTYPES and all(type(each) is int and each >= 0 for each in numbers)
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise _damaged(path, f"its header does not describe the tensor {name[:80]!r} by dtype, shape and data_offsets")
    return TensorSpec(dtype, tuple(shape)), start, stop


@lru_cache(maxsize=1024)
def _compared(path: Path, _state: tuple[int, ...]) -> set[str]:
    """The tensors of a file in some state that have matched their checksums, to be added to."""
    return set()


def _sums_in(path: Path, head: bytes, metadata: Mapping[str, str], names: Sequence[str]) -> Mapping[str, int]:
    """The checksums of tensors in a header, which is compared with its own; empty for a header without them."""
    if (stated := metadata.get(CHECKSUM)) is None:
        return {}
    begin = head.find(stated.encode())
    unsummed = head[:begin] + _as_text([0] * (1 + len(names))).encode() + head[begin + len(stated) :]
    try:
        of_head, *of_tensors = (int(each, 16) for each in stated.split(" "))
        if zlib.crc32(unsummed) == of_head:
            return dict(zip(names, of_tensors, strict=True))
    except ValueError:
        pass
    raise _changed(path)


def _changed(path: Path) -> StorageError:
    return StorageError(f"{path}: damaged or edited, since it does not match its checksum: make it again")


def _damaged(path: Path, problem: str) -> StorageError:
    return StorageError(f"{path}: cannot be read as a safetensors file: {problem}")
