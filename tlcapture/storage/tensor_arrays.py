"""Tensors of a `.pt` file as numpy arrays: mapped into memory, without torch, and without executing code.

    read_arrays(path)["blocks.3.mlp.hook_post"]     # [n_tokens, d_mlp]

Only tensors, plain values and dicts are read, whatever else a file may hold.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import StorageError
from tlcapture.storage.archives import Archive
from tlcapture.storage.files import FileState
from tlcapture.storage.remote.roots import local
from tlcapture.text import first_line

_BFLOAT16 = "bfloat16"
_STORED = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": _BFLOAT16,
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
}


class _Storage(NamedTuple):
    record: str
    dtype: str


def read_arrays(path: Path, *, whole: bool = False) -> Any:
    """The content of a file that `torch.save` wrote, with arrays in place of tensors; bfloat16 becomes float32.

    If `whole`, all tensors are compared with their checksums, once for as long as the file stays the same.

    Raises `StorageError` for a file that is not of this kind, or holds other objects.
    """
    if not path.is_file():
        raise StorageError(f"{path}: no such file")
    try:
        here = local(path)
        if whole:
            _check(here, FileState.of(here.stat()))
        return _Unpickler(_Mapped(here)).load()
    except Exception as error:
        raise StorageError(f"{path}: cannot be read as a tensor file: {first_line(error)}") from None


@lru_cache(maxsize=64)
def _check(path: Path, _state: FileState) -> None:
    _Mapped(path).check()


class _Mapped(Archive):
    """An archive whose bytes are mapped by numpy."""

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not a zip archive")
        super().__init__(path)

    @cached_property
    def _bytes(self) -> NDArray[Any]:
        return np.memmap(self._path, dtype=np.uint8, mode="r")

    def record(self, name: str) -> NDArray[Any]:
        """The bytes of a record."""
        if name not in self:
            raise ValueError(f"it has no record {name}")
        start, size = self._span(name)
        return self._bytes[start : start + size]


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: _Mapped):
        super().__init__(io.BytesIO(archive.read("data.pkl")))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._array
        if module == "torch" and name in _STORED:
            return _STORED[name]
        raise pickle.UnpicklingError(f"it holds more than tensors and plain values ({module}.{name})")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, record, *_ = pid
        if not isinstance(dtype, str) or dtype not in _STORED.values():
            raise pickle.UnpicklingError("it holds tensors of another kind")
        return _Storage(f"data/{record}", dtype)

    def _array(self, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Any:
        """The array of a tensor; raises `ValueError` where it would reach beyond its storage."""
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor is damaged")
        stored = np.dtype(np.uint16 if storage.dtype == _BFLOAT16 else storage.dtype)
        data = self._archive.record(storage.record)
        values = data[: len(data) // stored.itemsize * stored.itemsize].view(stored)
        if min((offset, *shape, *strides), default=0) < 0 or (
            all(shape) and offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) >= len(values)
        ):
            raise ValueError("a tensor reaches beyond its storage")
        steps = tuple(step * stored.itemsize for step in strides)
        found = (
            np.ndarray(shape, stored, values, offset * stored.itemsize, steps)
            if all(shape)
            else np.zeros(shape, stored)
        )
        return (found.astype(np.uint32) << 16).view(np.float32) if storage.dtype == _BFLOAT16 else found
