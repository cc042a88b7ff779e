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
_NEVER = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that archives with the same content are equal byte by byte


class Archive:
    """The records of an archive file.

    Raises:
        ValueError: the archive cannot be mapped, because it is compressed, a TorchScript program, or has two records
            of the same name.
        zipfile.BadZipFile: the file is not a zip archive, or is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        self._records = {member.filename.partition("/")[2]: member for member in members}
        if len(self._records) < len(members):
            raise ValueError("it has two records with the same name")
        if "constants.pkl" in self._records:
            raise ValueError("it is a TorchScript program")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its tensors are compressed")

    def __contains__(self, name: str) -> bool:
        return name in self._records

    @property
    def sizes(self) -> Counter[int]:
        """How many records there are of each size in bytes."""
        return Counter(member.file_size for member in self._records.values())

    def read(self, name: str) -> bytes:
        """A record's bytes; raises `ValueError` if they do not match their checksum."""
        start, size = self._span(name)
        data = self._bytes[start : start + size].tobytes()
        if zlib.crc32(data) != self._records[name].CRC:
            raise ValueError(f"its record {name} is damaged")
        return data

    def tensors(self, wanted: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> list[torch.Tensor]:
        """Records as memory-mapped tensors.

        Args:
            wanted: name, dtype and shape of each record.

        Raises:
            ValueError: a record is missing, damaged, or of another size.
        """
        import torch

        tensors = []
        for name, dtype, shape in wanted:
            if name not in self._records:
                raise ValueError(f"it has no record {name}")
            start, size = self._span(name)
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
        """The whole file, memory-mapped by torch, so that tensors keep no file open."""
        import torch

        storage = torch.UntypedStorage.from_file(str(self._path), False, self._path.stat().st_size)
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()

    def _span(self, name: str) -> tuple[int, int]:
        """The offset of a record's bytes in the file, and their number."""
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
    """Add a record to an archive that `torch.save` wrote; `torch.load` ignores it."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{name}", _NEVER), data)
