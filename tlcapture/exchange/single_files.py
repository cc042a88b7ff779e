"""Exported captures as one file each, `captures/{prompt_set}/{file}.safetensors` or `.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tlcapture.exchange.exported import BULK, ExportedCapture
from tlcapture.storage.files import read_json, write_json
from tlcapture.storage.folders import subfolders
from tlcapture.storage.validation import of_form
from tlcapture.text import dtype_name

_RECORD = "tlcapture"  # the key of the record in the header of a safetensors file


@dataclass(frozen=True)
class SingleFiles:
    """Writes each capture to a file of its own, of a `suffix` that `WRITERS` has."""

    folder: Path
    suffix: str

    def add(self, exported: ExportedCapture) -> None:
        """Write a capture."""
        path = self.folder / "captures" / exported.record["prompt_set"] / f"{exported.record['file']}{self.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[self.suffix](path, exported)

    def close(self) -> None:
        """Do nothing: every capture has been written already."""


def read_single_files(folder: Path, suffix: str) -> Iterator[ExportedCapture]:
    """The captures of a folder in the order of their names; raises `StorageError` for a damaged file."""
    within = folder / "captures"
    for _, parent in subfolders(within):
        for path in sorted(parent.glob(f"[!.]*{suffix}")):
            with of_form(path, "export"):
                exported = _READERS[suffix](path)
            yield exported


def _write_safetensors(path: Path, exported: ExportedCapture) -> None:
    """Scores become `[n_tokens, n_layers, n_points]` in float64, with NaN in place of null."""
    scores = {name: rows for name, rows in exported.columns.items() if name not in BULK}
    tensors = {name: torch.from_numpy(_array(rows)) for name, rows in scores.items()}
    tensors |= {name: tensor.contiguous() for name, tensor in exported.activations.items()}
    bulk = {name: exported.columns[name] for name in BULK}
    # save_file refuses tensors that share memory, as residual_in of a layer does with the layer before.
    unshared = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(unshared, path, {_RECORD: orjson.dumps({"record": exported.record, "columns": bulk}).decode()})


def _read_safetensors(path: Path) -> ExportedCapture:
    with safe_open(path, framework="pt") as file:
        content = orjson.loads((file.metadata() or {})[_RECORD])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    columns = dict(content["columns"])
    names = [name for name, tensor in tensors.items() if tensor.ndim == 3]
    for name in names:
        columns[name] = _lists(tensors.pop(name).numpy())
    return ExportedCapture(content["record"], columns, tensors)


def _write_json(path: Path, exported: ExportedCapture) -> None:
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in exported.activations.items()}
    activations = {
        name: {"dtype": dtypes[name], "values": np.ascontiguousarray(tensor.float().numpy())}
        for name, tensor in exported.activations.items()
    }
    write_json(path, {"record": exported.record, "columns": exported.columns, "activations": activations})


def _read_json(path: Path) -> ExportedCapture:
    content = read_json(path)
    activations = {
        name: torch.tensor(each["values"], dtype=torch.float32).to(getattr(torch, _dtype(each["dtype"])))
        for name, each in content["activations"].items()
    }
    return ExportedCapture(content["record"], content["columns"], activations)


def _dtype(name: str) -> str:
    if name not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"activations of the dtype {name!r}")
    return name


def _array(rows: list[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    shapes = {(len(row), len(at)) for row in rows if row is not None for at in row if at is not None}
    n_layers, n_points = next(iter(shapes), (0, 0))
    found = np.full((len(rows), n_layers, n_points), nan)
    for token, row in enumerate(rows):
        for layer, at in enumerate(row or ()):
            if at is not None:
                found[token, layer] = at
    return found


def _lists(values: np.ndarray[Any, Any]) -> list[Any]:
    return [
        None if np.isnan(row).all() else [None if np.isnan(at).all() else at.tolist() for at in row] for row in values
    ]


WRITERS: Mapping[str, Callable[[Path, ExportedCapture], None]] = {
    ".safetensors": _write_safetensors,
    ".json": _write_json,
}
_READERS: Mapping[str, Callable[[Path], ExportedCapture]] = {
    ".safetensors": _read_safetensors,
    ".json": _read_json,
}
