"""Placing vectors of other tools: from a file's layer numbers to blocks of the model, counted from 0.

| convention | number k is read at | it is imported as |
| --- | --- | --- |
| `hidden_states` | Hugging Face's `hidden_states[k]` | `residual_out` of block k - 1; 0, the embedding, is left out |
| `resid_post` | the output of block k | `residual_out` of block k |
| `resid_pre` | the input of block k | `residual_out` of block k - 1; 0, the embedding, is left out |

Negative numbers count from the end. Hugging Face's last hidden state has passed the final norm: a vector read there is
imported at the last layer and noted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcapture.errors import InputError, VectorError
from tlcapture.shapes import Vector
from tlcapture.storage.tensors import described, is_plain
from tlcapture.text import as_ranges
from tlcapture.traits.vector_sources.other_tools import REPENG, ToolVectors
from tlcapture.traits.vectors import check_direction

_SHIFT = {"hidden_states": -1, "resid_post": 0, "resid_pre": -1}


@dataclass(frozen=True, eq=False)
class Placed:
    """Vectors at the blocks of a model.

    Attributes:
        component: the activation they are for.
        convention: the meaning of the file's layer numbers; `None` for attention outputs, which have only one.
        vectors: by block, in float32.
        file_layers: the file's number of each block's vector.
        n_layers: layers of the model, if known.
        left_out: the vectors of the file that are not imported, and why.
        notes: further remarks for the user.
    """

    component: str
    convention: str | None
    vectors: Mapping[int, Vector]
    file_layers: Mapping[int, int]
    n_layers: int | None
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()


def place(
    path: Path,
    found: ToolVectors,
    *,
    convention: str | None = None,
    component: str | None = None,
    n_layers: int | None = None,
    d_model: int | None = None,
) -> Placed:
    """Place the vectors of a file in a model, whose sizes may be unknown.

    Raises:
        InputError: the convention is needed but not known, or contradicts the file.
        VectorError: a vector is not a finite non-zero float vector of the model's width, or none belongs to a layer.
    """
    component = _agreed(path, "--component", found.component, component) or "residual"
    if component == "attn_out":
        if convention is not None:
            raise InputError("--convention is for vectors of the residual stream, not for attention outputs")
        notes = [_MODULE_OUTPUT]
    else:
        convention, notes = _convention(path, found, convention, n_layers)
    n_layers = _checked_depth(path, found, convention, n_layers)
    rows = _from_start(path, found.rows, convention, n_layers)
    last = None if n_layers is None else n_layers - (convention != "hidden_states")
    shift = 0 if convention is None else _SHIFT[convention]
    placed = {n + shift: row for n, row in rows.items() if n + shift >= 0 and (last is None or n <= last)}
    beyond = sorted(n for n in rows if last is not None and n > last)
    left_out = ["row 0 is the embedding, not the output of a block"] if 0 in rows and shift else []
    if beyond:
        left_out.append(f"layers {as_ranges(beyond)} lie beyond the model's {n_layers} layers")
    if not placed:
        raise VectorError(f"{path}: none of its vectors belongs to a layer of the model: {'; '.join(left_out)}")
    if n_layers is not None and n_layers - 1 in placed and (convention == "hidden_states" or found.tool == REPENG):
        notes.append(
            f"the vector at layer {n_layers - 1} was read from Hugging Face's last hidden state, which has passed the "
            "final norm: another basis than residual_out, so prefer earlier layers"
        )
    width = d_model or _width(next(iter(placed.values())))
    return Placed(
        component=component,
        convention=convention,
        vectors={layer: _checked_vector(path, layer - shift, placed[layer], width) for layer in sorted(placed)},
        file_layers={layer: layer - shift for layer in sorted(placed)},
        n_layers=n_layers,
        left_out=left_out,
        notes=notes,
    )


_MODULE_OUTPUT = (
    "attn_out is what attention adds to the residual stream: in models that norm it first (Gemma 2 and 3, OLMo 2), "
    "vectors read at the attention module's own output are of another basis"
)


def _agreed(path: Path, option: str, said: str | None, asked: str | None) -> str | None:
    """The file's value or the option's; raises `InputError` if they differ."""
    if None not in (said, asked) and said != asked:
        raise InputError(f"{option} {asked}: {path} holds vectors of {said}: leave out {option}")
    return said or asked


def _convention(path: Path, found: ToolVectors, asked: str | None, n_layers: int | None) -> tuple[str, list[str]]:
    """The convention and, if it is a guess, a note."""
    known = _agreed(path, "--convention", found.convention, asked)
    if known is not None:
        return known, []
    if n_layers is not None and set(found.rows) == set(range(n_layers + 1)):
        return "hidden_states", [
            f"{n_layers + 1} vectors for {n_layers} layers: read as --convention hidden_states, row 0 is the embedding"
        ]
    raise InputError(
        f"{path}: layers {_listed(found.rows)} could be counted in several ways: give --convention hidden_states "
        "(Hugging Face's, 0 is the embedding), resid_post (outputs of blocks) or resid_pre (inputs of blocks)"
    )


def _checked_depth(path: Path, found: ToolVectors, convention: str | None, n_layers: int | None) -> int | None:
    """Layers of the model, which a table's number of rows must match."""
    if not found.is_table:
        return n_layers
    extra = int(convention == "hidden_states")
    if n_layers is None:
        return len(found.rows) - extra
    if len(found.rows) != n_layers + extra:
        raise VectorError(
            f"{path}: {len(found.rows)} rows, expected {n_layers + extra} for {convention or 'attn_out'} of a model "
            f"with {n_layers} layers: give another --convention, or import vectors of this model"
        )
    return n_layers


def _from_start(path: Path, rows: Mapping[int, Any], convention: str | None, n_layers: int | None) -> dict[int, Any]:
    """The rows by numbers that count from the start."""
    if min(rows) >= 0:
        return dict(rows)
    if n_layers is None:
        raise InputError(f"{path}: layers that count from the end need --model, the model that they come from")
    total = n_layers + (convention == "hidden_states")
    counted = {n + total if n < 0 else n: row for n, row in rows.items()}
    if len(counted) < len(rows) or min(counted) < 0:
        raise VectorError(f"{path}: layers {_listed(rows)} do not fit a model with {n_layers} layers")
    return counted


def _checked_vector(path: Path, number: int, row: Any, width: int | None) -> Vector:
    if not is_plain(row) or row.ndim != 1:
        raise VectorError(f"{path}: layer {number}: expected a one-dimensional float tensor, got {described(row)}")
    vector = row.detach().float()
    if len(vector) != width:
        raise VectorError(f"{path}: layer {number}: the vector has width {len(vector)}, expected {width}")
    check_direction(vector, f"{path}: layer {number}: the vector")
    return vector


def _width(row: Any) -> int | None:
    return row.shape[-1] if is_plain(row) and row.ndim else None


def _listed(rows: Mapping[int, Any]) -> str:
    return as_ranges(sorted(rows)) if min(rows) >= 0 else ", ".join(map(str, sorted(rows)))
