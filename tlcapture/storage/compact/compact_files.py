"""The common form of compact files of attention, logit lens and projections: a safetensors file with a head.

The head is the content that the JSON form has apart from its numbers, as JSON in the metadata of the safetensors file,
under `content`; `kind` is the kind of file, and `numbers` the rounding of its numbers. Loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from tlcapture.names import COMPACT
from tlcapture.storage.compact.safetensors_files import TensorFile
from tlcapture.storage.validation import not_valid

MOST_JSON = 64 * 2**20  # bytes of a JSON file; what would be larger is written in the compact form
PER_SCORE = 9.7  # bytes of a projected score in JSON: 6 significant digits
PER_WEIGHT = 9.5  # bytes in JSON of an attention weight: 4 significant digits and a comma
PER_PREDICTION = 35.0  # of {"token": ..., "prob": ...}
_VERSION = "1"


def is_compact(path: Path) -> bool:
    """Whether a path belongs to a file in the compact form."""
    return path.suffix == COMPACT


def is_written_compact(form: str | None, n_bytes: float) -> bool:
    """Whether a file is written in the compact form: `json` or `compact`, or by default if JSON would be too large."""
    return form == "compact" or (form is None and n_bytes > MOST_JSON)


def compact_metadata(kind: str, content: Any, numbers: str) -> dict[str, str]:
    """The metadata of a compact file."""
    return {"kind": kind, "version": _VERSION, "numbers": numbers, "content": orjson.dumps(content).decode()}


def open_compact(path: Path, kind: str) -> tuple[TensorFile, dict[str, Any]]:
    """A compact file of a kind and the content of its head; raises `StorageError` for any other file."""
    file = TensorFile.open(path)
    found = file.metadata.get("kind")
    if found != kind:
        stated = "states none" if found is None else f"states {found[:40]!r}"
        raise not_valid(path, kind, f"expected a safetensors file of the kind {kind!r}, but it {stated}")
    if (version := file.metadata.get("version", "none")) != _VERSION:
        raise not_valid(
            path, kind, f"its version is {version[:40]!r}, expected {_VERSION!r}: a newer tlcapture reads it"
        )
    try:
        content = orjson.loads(file.metadata.get("content", ""))
    except orjson.JSONDecodeError as error:
        raise not_valid(path, kind, f"content: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise not_valid(path, kind, "content: expected a JSON object")
    return file, content
