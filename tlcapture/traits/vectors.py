"""Trait vectors on disk: which there are, and reading one with everything that is known of its origin.

extraction/{category}/{trait}/vectors/{method}_layer{L}.pt      float32 [d_model]
                                      metadata.json
                                      attn_out_{method}_layer{L}.pt, attn_out_metadata.json
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tlcapture.errors import VectorError
from tlcapture.layout import Layout
from tlcapture.names import Trait
from tlcapture.shapes import Vector
from tlcapture.storage import read_json, read_tensors, remove, write_json, write_tensors

COMPONENTS = ("residual", "attn_out")
METHODS = ("probe", "mean_diff", "gradient")  # in the order of preference
_PREFIX = {"residual": "", "attn_out": "attn_out_"}
_FILE = re.compile(r"(?P<method>.+)_layer(?P<layer>\d+)\.pt")


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


@dataclass(frozen=True)
class VectorFolder:
    """The vectors of one trait in one experiment."""

    layout: Layout
    trait: Trait

    @property
    def path(self) -> Path:
        return self.layout.vectors(self.trait)

    def available(self, component: str) -> dict[str, list[int]]:
        """The layers there are, by method, methods in the order of preference."""
        found: dict[str, list[int]] = {}
        for path in self.path.glob("*.pt"):
            is_attn = path.name.startswith(_PREFIX["attn_out"])
            if is_attn != (component == "attn_out"):
                continue
            match = _FILE.fullmatch(path.name.removeprefix(_PREFIX[component]))
            if match:
                found.setdefault(match["method"], []).append(int(match["layer"]))
        order = {method: place for place, method in enumerate(METHODS)}
        return {method: sorted(found[method]) for method in sorted(found, key=lambda m: (order.get(m, 99), m))}

    def file(self, component: str, method: str, layer: int) -> Path:
        return self.path / f"{_PREFIX[component]}{method}_layer{layer}.pt"

    def metadata_file(self, component: str) -> Path:
        return self.path / f"{_PREFIX[component]}metadata.json"

    def metadata(self, component: str) -> dict[str, Any]:
        """What is recorded of the vectors' origin; empty where another tool left no record."""
        path = self.metadata_file(component)
        if not path.is_file():
            return {}
        value = read_json(path)
        if not isinstance(value, dict):
            raise VectorError(f"{path}: expected an object, got a JSON {type(value).__name__}")
        return value

    def read(self, component: str, method: str, layer: int) -> TraitVector:
        """Read one vector; raises `VectorError` where there is none or it is no usable direction."""
        path = self.file(component, method, layer)
        if not path.is_file():
            raise self.missing(component, method, layer)
        vector = read_tensors(path)
        if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
            raise VectorError(f"{path}: expected a one-dimensional float tensor")
        vector = vector.float()
        if not vector.isfinite().all() or not vector.any():
            raise VectorError(f"{path}: the vector is zero, or holds NaN or inf")
        metadata = self.metadata(component)
        listed = method in metadata.get("methods", ()) and layer in metadata.get("layers", ())
        origin = metadata if listed else {}
        return TraitVector(self.trait, component, method, layer, self.layout.experiment, vector, origin)

    def missing(self, component: str, method: str, layer: int) -> VectorError:
        """The error for a vector that is not there, naming those that are."""
        there = self.available(component)
        listed = "; ".join(f"{name}: {ranges(layers)}" for name, layers in there.items()) or "none"
        return VectorError(
            f"no {component} vector of {self.trait} by {method!r} at layer {layer} in experiment "
            f"{self.layout.experiment!r}; layers there are: {listed}"
        )

    def write(self, component: str, method: str, layer: int, vector: Vector) -> int:
        """Write one vector; returns the bytes written."""
        return write_tensors(self.file(component, method, layer), vector.float().clone())

    def remove(self, component: str, methods: Iterable[str], layers: Iterable[int]) -> None:
        """Remove the vectors of some methods and layers, where they are there."""
        wanted = list(layers)
        remove(self.file(component, method, layer) for method in methods for layer in wanted)

    def write_metadata(self, component: str, metadata: Mapping[str, Any]) -> None:
        write_json(self.metadata_file(component), dict(metadata), indent=True)


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
