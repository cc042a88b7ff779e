"""Trait vectors: reading one with everything that is known of its origin, and writing one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlcapture.errors import VectorError
from tlcapture.names import Trait
from tlcapture.shapes import Vector
from tlcapture.storage.files import Written, read_tensors, write_tensors
from tlcapture.storage.tensors import described, is_plain
from tlcapture.traits.vector_files import VectorFiles


@dataclass(frozen=True)
class TraitVector:
    """A direction `[d_model]` for a trait, and where it comes from. `metadata` is empty if unknown."""

    trait: Trait
    component: str
    method: str
    layer: int
    experiment: str
    vector: Vector
    metadata: Mapping[str, Any]

    @property
    def model(self) -> str | None:
        """Name of the model it was extracted from; `None` for a vector of unknown origin."""
        name = self.metadata.get("extraction_model")
        return None if name is None else str(name)


class VectorFolder(VectorFiles):
    """The vectors of one trait in one experiment."""

    def read(self, component: str, method: str, layer: int) -> TraitVector:
        """Read one vector; raises `VectorError` where there is none or it is no usable direction."""
        path = self.file(component, method, layer)
        if not path.is_file():
            raise self.missing(component, method, layer)
        value = read_tensors(path)
        if not is_plain(value) or value.ndim != 1:
            raise VectorError(f"{path}: expected a one-dimensional float tensor, got {described(value)}")
        vector = value.detach().float()
        if not vector.isfinite().all() or not vector.any():
            raise VectorError(f"{path}: the vector is zero, or holds NaN or inf")
        metadata = self.metadata(component)
        listed = method in metadata.get("methods", ()) and layer in metadata.get("layers", ())
        origin = metadata if listed else {}
        width = origin.get("hidden_dim")
        if width not in (None, len(vector)):
            raise VectorError(f"{path}: {len(vector)} numbers, but {self.metadata_file(component).name} says {width}")
        return TraitVector(self.trait, component, method, layer, self.layout.experiment, vector, origin)

    def write(self, component: str, method: str, layer: int, vector: Vector) -> Written:
        """Write one vector."""
        return write_tensors(self.file(component, method, layer), vector.float().clone())
