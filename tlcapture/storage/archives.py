"""The zip archives of `torch.save`: written here, and read and mapped by record without unpickling anything.

`torch.save` itself spends two thirds of its time on checksums. Here zlib computes them, with the processor's
instructions and without the GIL, so that several threads can write at the speed of the disk.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_LOCAL_HEADER = 30  # bytes of a zip's local file header before the record's name
_NEVER = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that archives with the same content are equal byte by byte
_FOLDER = "archive"
_ALIGNMENT = 64  # bytes to whose multiples records begin, so that mapped tensors are aligned
_PADDING = b"FB"  # the kind of zip's extra field that `torch.save` pads with
_LARGEST = 2**31 - 2**27  # bytes of a record from which zipfile writes 64-bit sizes

# Types without a storage, of most objects in a pickle.
_PLAIN = (str, int, float, bool, type(None), tuple, list, dict, OrderedDict)
Buffer = bytes | memoryview
_Whole = tuple[Any, int, tuple[int, ...], tuple[int, ...]]  # a storage, and a tensor's offset, shape and strides in it


class Row(NamedTuple):
    """A row of a tensor, which an archive stores as it stores the tensor `whole[number]`.

    Each tensor takes some microseconds to make, and the GIL is given away when it is freed.
    """

    whole: torch.Tensor
    number: int


# Makes further records of an archive from its storages in order, which are `data/0`, `data/1`, ...
MoreRecords = Callable[[Sequence[Any]], Mapping[str, bytes]]


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
        self._check(name, data)
        return data

    def check(self) -> None:
        """Raise `ValueError` if any record does not match its checksum."""
        for name in self._records:
            start, size = self._span(name)
            self._check(name, self._bytes[start : start + size].data)

    def _check(self, name: str, data: bytes | memoryview) -> None:
        stated = self._records[name].CRC
        if stated and zlib.crc32(data) != stated:  # 0: torch was told to compute none
            raise ValueError(f"its record {name} is damaged: it does not match its checksum")

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


def archive_of(value: Any, more: MoreRecords = lambda storages: {}) -> list[Buffer]:
    """The bytes of an archive, in pieces, as `torch.save` writes tensors and plain values.

    `torch.load` ignores the records of `more`. The pieces of tensors are their memory, which is not copied.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(value)
    file = _Pieces()
    with zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]
        _write_record(archive, "data.pkl", pickled.getbuffer())
        _write_record(archive, ".format_version", b"1")
        _write_record(archive, ".storage_alignment", str(_ALIGNMENT).encode())
        _write_record(archive, "byteorder", sys.byteorder.encode())
        for number, storage in enumerate(pickler.storages):
            _write_record(archive, f"data/{number}", _bytes_of(storage))
        _write_record(archive, "version", b"3\n")
        for name, data in more(pickler.storages).items():
            _write_record(archive, name, data)
    return file.pieces


class _Pieces:
    """A file that keeps what is written to it in pieces. Only whole pieces can be replaced, as zipfile does."""

    def __init__(self) -> None:
        self.pieces: list[Buffer] = []
        self._numbers: dict[int, int] = {}  # of pieces, by where they begin
        self._at = self._end = 0

    def write(self, data: Buffer) -> int:
        if self._at < self._end:
            number = self._numbers[self._at]
            assert len(self.pieces[number]) == len(data)
            self.pieces[number] = data
        elif data:
            self._numbers[self._at] = len(self.pieces)
            self.pieces.append(data)
            self._end += len(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def flush(self) -> None:
        """Do nothing."""


class _Pickler(pickle.Pickler):
    """Pickles a value as `torch.save` does: its storages are numbered, and written apart from it."""

    def __init__(self, file: IO[bytes]):
        import torch
        from torch.serialization import location_tag

        super().__init__(file, protocol=2)
        self.storages: list[torch.UntypedStorage] = []
        # The name and the place of each storage: one text for each, since a pickle holds equal objects again.
        self._known: dict[int, tuple[str, str]] = {}
        self._wholes: dict[int, _Whole | None] = {}  # by id
        self._torch, self._location_tag = torch, location_tag
        self._rebuild = torch._utils._rebuild_tensor_v2
        self._plain_dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
        self._without_storage = frozenset({*_PLAIN, Row, torch.Tensor})

    def persistent_id(self, each: Any) -> Any:
        if type(each) in self._without_storage:  # nearly all that a pickle holds
            return None
        torch = self._torch
        if isinstance(each, torch.TypedStorage):
            storage, kind, size = each._untyped_storage, getattr(torch, each._pickle_storage_type()), each._size()
        elif isinstance(each, torch.UntypedStorage):  # of a newer dtype, such as float8 or uint16
            storage, kind, size = each, torch.UntypedStorage, each.nbytes()
        else:
            return None
        if storage._cdata not in self._known:
            self._known[storage._cdata] = str(len(self.storages)), self._location_tag(storage)
            self.storages.append(storage)
        name, location = self._known[storage._cdata]
        return "storage", kind, name, location, size

    def reducer_override(self, each: Any) -> Any:
        """What `Tensor.__reduce_ex__` returns for a row of a tensor."""
        if type(each) is not Row:
            return NotImplemented
        if (found := self._whole(each.whole)) is None:
            return each.whole[each.number].__reduce_ex__(2)
        storage, offset, shape, strides = found
        at = offset + each.number * strides[0]
        return self._rebuild, (storage, at, shape[1:], strides[1:], False, OrderedDict())

    def _whole(self, tensor: torch.Tensor) -> _Whole | None:
        """The storage of a tensor, and how it lies there; `None` for a tensor that has more than that."""
        if id(tensor) not in self._wholes:
            is_plain = type(tensor) is self._torch.Tensor and tensor.dtype in self._plain_dtypes
            found = None
            if is_plain and not (tensor.requires_grad or tensor.is_neg()):
                storage = self._torch.TypedStorage(
                    wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
                )
                found = storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
            self._wholes[id(tensor)] = found
        return self._wholes[id(tensor)]


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    import torch

    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy())


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}", _NEVER)
    info.CRC, info.file_size, is_large = 0, len(data), len(data) >= _LARGEST
    assert archive.fp is not None
    header = archive.fp.tell() + len(info.FileHeader(is_large)) + len(_PADDING) + 2
    n_padding = -header % _ALIGNMENT
    info.extra = _PADDING + n_padding.to_bytes(2, "little") + bytes(n_padding)
    with archive.open(info, "w", force_zip64=is_large) as record:
        record.write(data)


def storages_of(value: Any) -> dict[int, int]:
    """Size in bytes of the storages of the dense tensors in a value, by address."""
    storages: dict[int, int] = {}
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple):
            if id(each) not in seen:  # a value can contain itself, or the same value a million times
                seen.add(id(each))
                waiting += each.values() if isinstance(each, dict) else each
        elif hasattr(each, "untyped_storage") and _is_in_memory(each):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def _is_in_memory(tensor: Any) -> bool:
    return str(tensor.layout) == "torch.strided" and not tensor.is_meta and tensor.numel() > 0
