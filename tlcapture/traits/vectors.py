"""Trait vectors: reading one with the record of its origin, and writing one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tlcapture.errors import VectorError
from tlcapture.names import Trait
from tlcapture.shapes import Vector
from tlcapture.storage.files import Written, read_tensors, write_tensors
from tlcapture.storage.tensors import described, is_plain
from tlcapture.traits.missing_vectors import no_vector
from tlcapture.traits.vector_files import VectorFiles

_SMALLEST, _LARGEST = 1e-9, 1e15  # components whose squares and their sums float32 holds without loss


@dataclass(frozen=True, eq=False)
class TraitVector:
    """A direction `[d_model]` for a trait, and its origin.

    `metadata` is the record of the extraction, empty for a vector of unknown origin.
    """

    trait: Trait
    component: str
    method: str
    layer: int
    experiment: str
    vector: Vector = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)

    @cached_property
    def unit(self) -> Vector:
        """The direction as a vector of length 1, in float32."""
        direction = self.vector.double()
        return (direction / direction.norm()).float()

    @property
    def model(self) -> str | None:
        """Name of the model it was extracted from; `None` for a vector of unknown origin."""
        name = self.metadata.get("extraction_model")
        return None if name is None else str(name)


def read_vector(files: VectorFiles, component: str, method: str, layer: int) -> TraitVector:
    """Read one of a trait's vectors, in float32.

    Only its direction is used: a vector whose length (nearly) exceeds float32 is scaled by a power of two.

    Raises:
        VectorError: the vector is missing, is not a finite non-zero one-dimensional tensor, or has another width than
            its metadata states.
        StorageError: a file is damaged.
    """
    path = files.file(component, method, layer)
    if not path.is_file():
        raise no_vector(files.layout, files.trait, component, method, layer, files.available(component))
    value = read_tensors(path)
    if not is_plain(value) or value.ndim != 1:
        raise VectorError(f"{path}: expected a one-dimensional float tensor, got {described(value)}")
    vector = value.detach().float()
    check_direction(vector, f"{path}: the vector")
    vector = _within_float32(vector)
    metadata = files.metadata(component, method)
    listed = method in metadata.get("methods", ()) and layer in metadata.get("layers", ())
    origin = metadata if listed else {}
    width = origin.get("hidden_dim")
    if width not in (None, len(vector)):
        name = files.metadata_file(component, method).name
        raise VectorError(f"{path}: the vector has width {len(vector)}, but {name} gives {width}")
    return TraitVector(files.trait, component, method, layer, files.layout.experiment, vector, origin)


def check_direction(vector: Vector, name: str) -> None:
    """Raise `VectorError` for a vector without a direction: a zero one, or one that holds NaN or inf."""
    if not vector.isfinite().all() or not vector.any():
        raise VectorError(f"{name} is zero, or holds NaN or inf")


def write_vector(files: VectorFiles, component: str, method: str, layer: int, vector: Vector) -> Written:
    """Write one of a trait's vectors, `[d_model]`, in float32."""
    return write_tensors(files.file(component, method, layer), vector.float().clone())


def _within_float32(vector: Vector) -> Vector:
    """The vector, or a multiple of it if the squares of its components are too large or small for float32."""
    largest = float(vector.abs().max())
    return vector if _SMALLEST < largest < _LARGEST else (vector.double() * 2.0 ** -math.frexp(largest)[1]).float()
