"""The zip archives that `torch.save` writes: their records by name, read and mapped without unpickling anything."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_LOCAL_HEADER = 30  # bytes of a zip's local file header before the record's name
_NEVER = (1980, 1, 1, 0, 0, 0)  # a date that says nothing: archives of the same content are the same bytes


class Archive:
    """The records of an archive as it lies in a file.

    Raises `ValueError` or `zipfile.BadZipFile` for one that cannot be mapped: what is stored has to be there as
    it is, uncompressed, and each name once.
    """

    def __init__(self, path: Path):
        self._path = path
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        self._records = {member.filename.partition("/")[2]: member for member in members}
        if len(self._records) < len(members):
            raise ValueError("it has two records of one name")
        if "constants.pkl" in self._records:
            raise ValueError("it is a TorchScript program")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its tensors are compressed")

    def __contains__(self, name: str) -> bool:
        return name in self._records

    @property
    def sizes(self) -> Counter[int]:
        """How many bytes records have."""
        return Counter(member.file_size for member in self._records.values())

    def read(self, name: str) -> bytes:
        """A record's bytes, held against their checksum."""
        start, size = self._place(name)
        data = self._bytes[start : start + size].tobytes()
        if zlib.crc32(data) != self._records[name].CRC:
            raise ValueError(f"its record {name} is damaged")
        return data

    def tensors(self, wanted: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> list[torch.Tensor]:
        """Records as tensors of a dtype and shape, memory-mapped together."""
        import torch

        tensors = []
        for name, dtype, shape in wanted:
            if name not in self._records:
                raise ValueError(f"it has no record {name}")
            start, size = self._place(name)
            if size != prod(shape) * dtype.itemsize:
                raise ValueError(f"its record {name} has {size} bytes, expected {list(shape)} of {dtype.itemsize} each")
            if not size:
                tensors.append(torch.empty(tuple(shape), dtype=dtype))
                continue
            tensors.append(
                torch.frombuffer(self._bytes, dtype=dtype, count=prod(shape), offset=start).view(tuple(shape))
            )
        return tensors

    @cached_property
    def _bytes(self) -> NDArray[Any]:
        """The whole file, memory-mapped, as torch maps it: no file stays open for as long as a tensor lives."""
        import torch

        storage = torch.UntypedStorage.from_file(str(self._path), False, self._path.stat().st_size)
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()

    def _place(self, name: str) -> tuple[int, int]:
        """Where a record's bytes begin in the file, and how many there are."""
        member = self._records[name]
        local = self._bytes[member.header_offset : member.header_offset + _LOCAL_HEADER].tobytes()
        if len(local) < _LOCAL_HEADER or local[:4] != b"PK\x03\x04":
            raise ValueError(f"its record {name} is not where it should be")
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = member.header_offset + _LOCAL_HEADER + names
        if start + member.file_size > len(self._bytes):
            raise ValueError(f"its record {name} is cut off")
        return start, member.file_size


def append_record(path: Path, name: str, data: bytes) -> None:
    """Add a record to an archive that `torch.save` wrote; `torch.load` does not look at it."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{name}", _NEVER), data)
