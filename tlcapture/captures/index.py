"""A JSON index of a raw residual file, next to its pickle, with which it opens ten times faster.

A capture is 180 views of a few storages, and torch's safe unpickler, which is Python, builds them one by one. The
index names the storages instead: no pickle is read, and each part's activations are one memory-mapped tensor. A
file without an index (of another tool, or saved again by hand) is read from its pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tlcapture.captures.capture_names import INDEX
from tlcapture.captures.checksums import WrittenSums, row_sums
from tlcapture.captures.format import FORMAT_VERSION, CaptureMetadata, Spans, TokenId, check_version, held_of_part
from tlcapture.prompts.spans import check_spans
from tlcapture.storage.archives import Archive
from tlcapture.storage.files import opening
from tlcapture.storage.validation import FileContent, checked
from tlcapture.text import dtype_name
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.residual import ResidualStream, layers_with_attention

PARTS = ("prompt", "response")
DTypeName = Literal["float16", "bfloat16", "float32", "float64"]
Axis = Annotated[int, Field(ge=0, lt=2**31)]
Checksum = Annotated[int, Field(ge=0, lt=2**64)]


class Stored(FileContent):
    """A tensor: a record of the archive, with the dtype and shape of its bytes, and the checksum of each of its rows.

    Files that were written before there were checksums have none.
    """

    record: str
    dtype: DTypeName
    shape: Annotated[list[Axis], Field(min_length=3, max_length=3)]
    row_sums: list[Checksum] | None = None

    @classmethod
    def of(cls, tensor: Tensor, number: int) -> dict[str, Any]:
        """The entry for a tensor that the archive stores as `data/{number}`."""
        dtype = dtype_name(tensor.dtype)
        return {
            "record": f"data/{number}",
            "dtype": dtype,
            "shape": list(tensor.shape),
            "row_sums": row_sums(tensor),
        }

    @model_validator(mode="after")
    def _has_a_sum_for_each_row(self) -> Stored:
        if self.row_sums is not None and len(self.row_sums) != self.shape[0]:
            raise ValueError(f"{len(self.row_sums)} row_sums, expected {self.shape[0]}")
        return self


class IndexedPart(FileContent):
    """Prompt or response; `points` and `attn_out` are laid out as in `ResidualStream`."""

    text: str
    tokens: list[str]
    token_ids: list[TokenId]
    points: Stored
    attn_out: Stored | None = None


class CaptureIndex(FileContent):
    """The index of a whole file."""

    format_version: Literal[1]
    prompt: IndexedPart
    response: IndexedPart
    metadata: CaptureMetadata
    spans: Spans = ()

    @property
    def kept(self) -> KeptPoints:
        """Which layers and points the file holds."""
        metadata = self.metadata
        return KeptPoints.of(metadata.n_layers, metadata.layers or (), metadata.points or ())

    @model_validator(mode="after")
    def _is_of_one_capture(self) -> CaptureIndex:
        check_spans(self.spans, len(self.prompt.tokens) + len(self.response.tokens))
        kept, width = self.kept, self.metadata.d_model
        outputs = layers_with_attention(kept, self.metadata.attention_layers)
        if (self.prompt.attn_out is None) != (self.response.attn_out is None):
            raise ValueError("prompt and response hold different activations")
        for name in PARTS:
            part = getattr(self, name)
            n_tokens = len(part.tokens)
            if len(part.token_ids) != n_tokens:
                raise ValueError(
                    f"{name}: {n_tokens} tokens, but {len(part.token_ids)} token_ids: numbers must be equal"
                )
            held = held_of_part(self, name)
            n_held = n_tokens if held is None else len(held)
            for stored, n_rows in ((part.points, len(kept.point_indices)), (part.attn_out, len(outputs))):
                if stored is not None and stored.shape != [n_rows, n_held, width]:
                    raise ValueError(f"{name}: {stored.shape}, expected {[n_rows, n_held, width]}")
        return self


def read_index(path: Path) -> tuple[CaptureIndex, dict[str, Any], dict[str, ResidualStream]] | None:
    """The index of a file, its metadata unchanged, and the activations of its parts; `None` for a file without index.

    Raises `StorageError` for a file that is not a torch archive, and where the index and the file disagree.
    """
    with opening(path):
        archive = Archive(path)
        if INDEX not in archive:
            return None
        value = json.loads(archive.read(INDEX))
        check_version(value, path)
        index = checked(CaptureIndex, value, path, "raw residual")
        streams = {name: _stream(path, archive, index, name) for name in PARTS}
        return index, value["metadata"], streams


def index_record(content: Mapping[str, Any], streams: Mapping[str, ResidualStream], storages: Sequence[Any]) -> bytes:
    """The index of a file that is being written; empty if it could not reproduce the pickle's content exactly.

    `content` is the content of the file, `streams` are the activations of its parts, and `storages` those that the
    archive holds.
    """
    value: dict[str, Any] = {"format_version": FORMAT_VERSION, "metadata": content["metadata"]}
    value.update({"spans": content["spans"]} if "spans" in content else {})
    numbers = {storage._cdata: number for number, storage in enumerate(storages)}
    try:
        for name in PARTS:
            value[name] = {key: content[name][key] for key in ("text", "tokens", "token_ids")}
            value[name]["points"] = _stored(streams[name].points, numbers)
            outputs = streams[name].attn_out
            value[name]["attn_out"] = None if outputs is None else _stored(outputs, numbers)
            IndexedPart.model_validate(value[name])
        data = json.dumps(value).encode()
        is_exact = json.loads(data) == value  # JSON turns tuples into lists, and keys that are numbers into strings
    except (TypeError, ValueError, KeyError):  # metadata that JSON cannot hold, or a tensor that is part of another
        return b""
    return data if is_exact else b""


def _stored(tensor: Tensor, numbers: Mapping[int, int]) -> dict[str, Any]:
    """The entry of a tensor; raises `ValueError` if it is not all of its storage, `KeyError` if that is missing."""
    storage = tensor.untyped_storage()
    if tensor.storage_offset() or not tensor.is_contiguous() or tensor.nbytes != storage.nbytes():
        raise ValueError("a tensor that shares its storage with others")
    return Stored.of(tensor, numbers[storage._cdata])


def _stream(path: Path, archive: Archive, index: CaptureIndex, name: str) -> ResidualStream:
    """The activations of a part, by its name."""
    part, attention = getattr(index, name), index.metadata.attention_layers
    stored = {"points": part.points, **({} if part.attn_out is None else {"attn_out": part.attn_out})}
    wanted = [(each.record, getattr(torch, each.dtype), each.shape) for each in stored.values()]
    points, *outputs = archive.tensors(wanted)
    sums = {buffer: each.row_sums for buffer, each in stored.items() if each.row_sums is not None}
    check = WrittenSums(path, name, sums) if sums else None
    with_attention = None if attention is None else tuple(attention)
    return ResidualStream(points, outputs[0] if outputs else None, index.kept, with_attention, check)
