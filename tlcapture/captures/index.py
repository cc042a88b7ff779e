"""What a raw residual file holds, said once more in JSON beside its pickle, so that it opens ten times sooner.

A capture is 180 tensors of a few storages, and torch's safe unpickler, which is Python, builds each apart. The
index names the storages instead: no pickle is read, and each part's activations are one tensor, mapped. A file
without an index (of another tool, or saved again by hand) is read from its pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tlcapture.captures.format import FORMAT_VERSION, CaptureMetadata, TokenId, check_version
from tlcapture.storage.archives import Archive, append_record
from tlcapture.storage.files import opening
from tlcapture.storage.validation import FileContent, checked
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.residual import ResidualStream

NAME = "tlcapture.json"
PARTS = ("prompt", "response")
DTypeName = Literal["float16", "bfloat16", "float32", "float64"]
Axis = Annotated[int, Field(ge=0, lt=2**31)]


class Stored(FileContent):
    """A tensor: a record of the archive, and what its bytes are."""

    record: str
    dtype: DTypeName
    shape: Annotated[list[Axis], Field(min_length=3, max_length=3)]

    @classmethod
    def of(cls, tensor: Tensor, number: int) -> dict[str, Any]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"record": f"data/{number}", "dtype": dtype, "shape": list(tensor.shape)}


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

    @property
    def kept(self) -> KeptPoints:
        said = self.metadata
        return KeptPoints.of(said.n_layers, said.layers or (), said.points or ())

    @model_validator(mode="after")
    def _is_of_one_capture(self) -> CaptureIndex:
        kept, width = self.kept, self.metadata.d_model
        if (self.prompt.attn_out is None) != (self.response.attn_out is None):
            raise ValueError("prompt and response have not the same activations")
        for name in PARTS:
            part = getattr(self, name)
            n_tokens = len(part.tokens)
            if len(part.token_ids) != n_tokens:
                raise ValueError(
                    f"{name}: {n_tokens} tokens, but {len(part.token_ids)} token_ids: they must be as many"
                )
            for stored, n_rows in ((part.points, len(kept.point_indices)), (part.attn_out, len(kept.layers))):
                if stored is not None and stored.shape != [n_rows, n_tokens, width]:
                    raise ValueError(f"{name}: {stored.shape}, expected {[n_rows, n_tokens, width]}")
        return self


def read_index(path: Path) -> tuple[CaptureIndex, dict[str, Any], dict[str, ResidualStream]] | None:
    """The index of a file, its metadata as they are, and the activations of its parts; `None` where it has none.

    Raises `StorageError` for a file that is no archive of torch's, and where the index and the file disagree.
    """
    with opening(path):
        archive = Archive(path)
        if NAME not in archive:
            return None
        value = json.loads(archive.read(NAME))
        check_version(value, path)
        index = checked(CaptureIndex, value, path, "raw residual file")
        kept = index.kept
        only = None if kept.is_all else kept
        return index, value["metadata"], {name: _stream(archive, getattr(index, name), only) for name in PARTS}


def add_index(path: Path, content: Mapping[str, Any], streams: Mapping[str, ResidualStream]) -> None:
    """Add an index to a file that was just written, where it would say the same as the pickle does.

    `content` is what the file holds, `streams` the activations of its parts.
    """
    said: dict[str, Any] = {"format_version": FORMAT_VERSION, "metadata": content["metadata"]}
    number = count()  # torch numbers storages as they come in the pickle: in each layer the points come first
    for name in PARTS:
        said[name] = {key: content[name][key] for key in ("text", "tokens", "token_ids")}
        said[name]["points"] = Stored.of(streams[name].points, next(number))
        outputs = streams[name].attn_out
        said[name]["attn_out"] = None if outputs is None else Stored.of(outputs, next(number))
    try:
        data = json.dumps(said).encode()
        archive = Archive(path)
        mapped = {name: _stream(archive, IndexedPart.model_validate(said[name]), None) for name in PARTS}
    except (TypeError, ValueError):  # metadata that JSON cannot say, or storages that are others than was thought
        return
    is_exact = json.loads(data) == said  # of tuples it makes lists, of numbers as keys texts
    if is_exact and all(_is_same(mapped[name], streams[name]) for name in PARTS):
        append_record(path, NAME, data)


def _stream(archive: Archive, part: IndexedPart, only: KeptPoints | None) -> ResidualStream:
    stored = [each for each in (part.points, part.attn_out) if each is not None]
    points, *outputs = archive.tensors([(each.record, getattr(torch, each.dtype), each.shape) for each in stored])
    return ResidualStream(points, outputs[0] if outputs else None, only)


def _is_same(one: ResidualStream, other: ResidualStream) -> bool:
    outputs = one.attn_out is None or (other.attn_out is not None and one.attn_out.equal(other.attn_out))
    return one.points.equal(other.points) and outputs
