"""Exported captures as two Parquet tables, the configurations of a Hugging Face dataset.

    captures/00000.parquet      a row for each capture: texts, spans, metadata
    tokens/00000.parquet        a row for each token: its scores, and its activations where they were asked for

The rows of both are in the same order. bfloat16, which Arrow does not have, is stored as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tlcapture.exchange.exported import BULK, ExportedCapture
from tlcapture.storage.validation import of_form
from tlcapture.text import dtype_name

_TOKEN_COLUMNS = {
    "token_idx": pa.int64(),
    "part": pa.string(),
    "token": pa.string(),
    "token_id": pa.int64(),
    "span": pa.string(),
    "role": pa.string(),
}
_SCORES = pa.list_(pa.list_(pa.float64()))
_STORED_AS = {
    "float16": pa.float16(),
    "bfloat16": pa.uint16(),
    "float32": pa.float32(),
}
_SPANS = pa.list_(
    pa.struct(
        {"kind": pa.string(), "role": pa.string(), "start": pa.int64(), "stop": pa.int64(), "reason": pa.string()}
    )
)
_CAPTURES = pa.schema(
    {
        "prompt_set": pa.string(),
        "file": pa.string(),
        "prompt_id": pa.string(),
        "sample": pa.int64(),
        "variant": pa.string(),
        "model": pa.string(),
        "prompt": pa.string(),
        "response": pa.string(),
        "n_prompt_tokens": pa.int64(),
        "n_tokens": pa.int64(),
        "spans": _SPANS,
        "stop_reason": pa.string(),
        "activation_dtype": pa.string(),
        "record": pa.string(),
    }
)
_BUFFERED = 64 * 2**20  # bytes of rows that make one row group
_READ = 16 * 2**20  # bytes of rows that are read at a time


@dataclass(frozen=True)
class Columns:
    """The columns of the table of tokens in addition to `BULK`: scores, and activations with their dtype."""

    scores: tuple[str, ...]
    activations: tuple[str, ...]
    dtype: str = "float32"

    @property
    def schema(self) -> pa.Schema:
        """The schema of the table."""
        stored = pa.list_(_STORED_AS[self.dtype])
        activations = [pa.field(name, stored, metadata={"dtype": self.dtype}) for name in self.activations]
        scores = [pa.field(name, _SCORES) for name in self.scores]
        names = [pa.field(name, pa.string()) for name in ("prompt_set", "file")]
        return pa.schema([*names, *(pa.field(*each) for each in _TOKEN_COLUMNS.items()), *scores, *activations])


@dataclass(eq=False)
class ParquetFolder:
    """Writes the tables of exported captures to a folder, in shards of at most about `shard_bytes`."""

    folder: Path
    columns: Columns
    shard_bytes: int
    _waiting: list[tuple[dict[str, Any], pa.Table]] = field(default_factory=list)  # rows of both tables
    _bytes: int = 0
    _shards: dict[str, _Shards] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schemas = {"captures": _CAPTURES, "tokens": self.columns.schema}
        self._shards = {name: _Shards(self.folder / name, schema, self.shard_bytes) for name, schema in schemas.items()}

    def add(self, exported: ExportedCapture) -> None:
        """Add a capture; it is written together with others."""
        row, tokens = _row(exported), _tokens(exported, self.columns)
        self._waiting.append((row, tokens))
        self._bytes += tokens.nbytes + len(row["record"])
        if self._bytes >= _BUFFERED:
            self._flush()

    def close(self) -> None:
        """Write the captures that are waiting, and close the files."""
        self._flush()
        for shards in self._shards.values():
            shards.close()

    def _flush(self) -> None:
        if self._waiting:
            self._shards["captures"].write(pa.Table.from_pylist([row for row, _ in self._waiting], schema=_CAPTURES))
            self._shards["tokens"].write(pa.concat_tables(tokens for _, tokens in self._waiting))
        self._waiting, self._bytes = [], 0


def read_parquet(folder: Path) -> Iterator[ExportedCapture]:
    """The captures of a folder, one after the other; raises `StorageError` for damaged tables."""
    with of_form(folder, "export"):
        captures = _captures(folder)
    while True:
        with of_form(folder, "export"):
            exported = next(captures, None)
        if exported is None:
            return
        yield exported


def _captures(folder: Path) -> Iterator[ExportedCapture]:
    tokens = _Rows(sorted((folder / "tokens").glob("*.parquet")))
    for path in sorted((folder / "captures").glob("*.parquet")):
        for row in _rows_of(path):
            record = orjson.loads(row["record"])
            table = tokens.take(int(record["n_tokens"]))
            if set(table["file"].to_pylist()) - {record["file"]}:
                raise ValueError(f"the tokens of {record['prompt_set']}/{record['file']} are not in their place")
            yield _exported(record, table, row["activation_dtype"])


# -- writing --------------------------------------------------------------------------------------


@dataclass
class _Shards:
    folder: Path
    schema: pa.Schema
    shard_bytes: int
    _writer: pq.ParquetWriter | None = None
    _count: int = 0
    _path: Path = Path()

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self.folder.mkdir(exist_ok=True)
            self._path = self.folder / f"{self._count:05d}.parquet"
            self._writer = pq.ParquetWriter(self._path, self.schema, compression="zstd")
            self._count += 1
        self._writer.write_table(table)
        if self._path.stat().st_size >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _row(exported: ExportedCapture) -> dict[str, Any]:
    record, metadata = exported.record, exported.record["capture"] or {}
    known = {name: metadata.get(name) for name in ("sample", "variant", "stop_reason")}
    dtypes = {dtype_name(tensor.dtype) for tensor in exported.activations.values()}
    return {
        **{name: record[name] for name in _CAPTURES.names if name in record},
        **known,
        "prompt_id": str(metadata.get("prompt_id", record["file"])),
        "model": metadata.get("inference_model"),
        "activation_dtype": next(iter(dtypes), None),
        "record": orjson.dumps(record).decode(),
    }


def _tokens(exported: ExportedCapture, columns: Columns) -> pa.Table:
    n_tokens, record, schema = len(exported.columns["token"]), exported.record, columns.schema
    arrays = [pa.array([record[name]] * n_tokens, pa.string()) for name in ("prompt_set", "file")]
    arrays += [pa.array(exported.columns[name], of) for name, of in _TOKEN_COLUMNS.items()]
    for name in columns.scores:
        rows = exported.columns.get(name)
        arrays.append(pa.nulls(n_tokens, _SCORES) if rows is None else _nested(rows))
    for name in columns.activations:
        tensor = exported.activations.get(name)
        of = schema.field(name).type
        arrays.append(pa.nulls(n_tokens, of) if tensor is None else _vectors(tensor, columns.dtype, of))
    return pa.Table.from_arrays(arrays, schema=schema)


def _nested(rows: Sequence[Any]) -> pa.Array:
    """Scores as an array; the slow way where a layer has no value."""
    if any(row is None or any(at is None for at in row) for row in rows):
        return pa.array(rows, _SCORES)
    values = np.array(rows, dtype=np.float64)
    n_tokens, n_layers, n_points = values.shape
    inner = pa.ListArray.from_arrays(_offsets(n_tokens * n_layers, n_points), pa.array(values.reshape(-1)))
    return pa.ListArray.from_arrays(_offsets(n_tokens, n_layers), inner)


def _offsets(n: int, length: int) -> pa.Array:
    return pa.array(np.arange(n + 1, dtype=np.int32) * length)


def _vectors(tensor: Tensor, dtype: str, of: pa.DataType) -> pa.Array:
    """Activations `[n_tokens, d_model]` as an array of lists."""
    values = tensor.to(getattr(torch, dtype)).contiguous()
    bits = values.view(torch.uint16) if dtype == "bfloat16" else values
    flat = pa.array(bits.reshape(-1).numpy(), of.value_type)
    return pa.ListArray.from_arrays(_offsets(*values.shape), flat)


# -- reading --------------------------------------------------------------------------------------


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    for batch in _batches(path):
        yield from batch.to_pylist()


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a file, about `_READ` bytes at a time."""
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    yield from file.iter_batches(batch_size=max(1, int(_READ / max(1.0, largest))))


class _Rows:
    """The rows of several files in order, read in requested numbers."""

    def __init__(self, paths: Iterable[Path]):
        self._batches = (batch for path in paths for batch in _batches(path))
        self._rest: pa.Table | None = None

    def take(self, n_rows: int) -> pa.Table:
        parts: list[pa.Table] = []
        needed = n_rows
        while needed or not parts:
            if self._rest is None or not len(self._rest):
                batch = next(self._batches, None)
                if batch is None:
                    raise ValueError(f"{needed} rows of tokens are missing")
                self._rest = pa.Table.from_batches([batch])
            parts.append(self._rest.slice(0, needed))
            self._rest = self._rest.slice(len(parts[-1]))
            needed -= len(parts[-1])
        return pa.concat_tables(parts)


def _exported(record: dict[str, Any], table: pa.Table, dtype: str | None) -> ExportedCapture:
    columns = {name: table[name].to_pylist() for name in BULK}
    activations = {}
    for name in table.column_names:
        if name in BULK or name in ("prompt_set", "file"):
            continue
        stored = table.schema.field(name)
        column = table[name].combine_chunks()
        if stored.type == _SCORES:
            columns[name] = column.to_pylist()
        elif column.null_count < len(column):
            activations[name] = _tensor(column, stored, dtype or "float32")
    return ExportedCapture(record, columns, activations)


def _tensor(column: pa.Array, stored: pa.Field, dtype: str) -> Tensor:
    if dtype not in _STORED_AS:
        raise ValueError(f"activations of the dtype {dtype!r}")
    values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).copy())
    if (stored.metadata or {}).get(b"dtype") == b"bfloat16":
        values = values.view(torch.bfloat16)
    return values.reshape(len(column), -1).to(getattr(torch, dtype))
