"""Trait vectors on disk: their paths, which of them exist, and the record of their origin. Loads no torch.

extraction/{category}/{trait}/vectors/{method}_layer{L}.pt      float32 [d_model]
                                      metadata.json
                                      attn_out_{method}_layer{L}.pt, attn_out_metadata.json

Vectors that another tool made have the method `imported` and their own record, `imported_metadata.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from os.path import lexists
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_bytes, read_json, remove, write_json
from tlcapture.storage.folders import stems_in
from tlcapture.storage.validation import FileContent, Layer, Number, checked
from tlcapture.text import beside, layers_named
from tlcapture.traits.calibration import CalibrationRecord
from tlcapture.traits.missing_vectors import no_vectors, no_vectors_of_trait

METHODS = ("probe", "mean_diff", "gradient")  # in the order of preference
IMPORTED = "imported"  # the method of vectors that another tool made; it comes last
_PREFIX = {"residual": "", "attn_out": "attn_out_"}
# Only names that `file` generates: a layer written in another way (layer007) would be listed but could not be read.
_FILE = re.compile(r"(?P<method>[A-Za-z0-9_.-]+)_layer(?P<layer>0|[1-9][0-9]{0,3})\.pt")


class VectorMetadata(FileContent):
    """The content of `metadata.json`; every field is optional, since other tools write fewer."""

    extraction_model: str | None = None
    methods: list[str] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list)
    num_layers: int | None = Field(default=None, ge=1, le=10_000)
    hidden_dim: int | None = Field(default=None, ge=1)
    position: str | None = None
    model_fingerprint: str | None = None
    examples: str | None = None
    examples_in_files: str | None = None
    examples_as: Literal["texts", "scenarios"] | None = None
    split: VectorSplit | None = None
    calibration: Calibrations | None = None
    held_out_calibration: Calibrations | None = None
    typical_norms: list[Number] | None = None


Calibrations = dict[str, dict[str, CalibrationRecord]]  # by method and layer


class VectorSplit(FileContent):
    """The split of the examples into those for fitting and those held out."""

    seed: int | None = None


@dataclass(frozen=True)
class VectorFiles:
    """The files of one trait's vectors in one experiment."""

    layout: Layout
    trait: Trait

    @property
    def path(self) -> Path:
        """The folder of the vectors."""
        return self.layout.vectors(self.trait)

    def available(self, component: str) -> dict[str, list[int]]:
        """The layers that have a vector, by method, methods in the order of preference."""
        found: dict[str, list[int]] = {}
        for name in (f"{stem}.pt" for stem in stems_in(self.path, ".pt")):
            is_attn = name.startswith(_PREFIX["attn_out"])
            if is_attn != (component == "attn_out"):
                continue
            match = _FILE.fullmatch(name.removeprefix(_PREFIX[component]))
            if match:
                found.setdefault(match["method"], []).append(int(match["layer"]))
        order = {method: rank for rank, method in enumerate(METHODS)}
        ranked = sorted(found, key=lambda method: (method == IMPORTED, order.get(method, 99), method))
        return {method: sorted(found[method]) for method in ranked}

    def file(self, component: str, method: str, layer: int) -> Path:
        """The path of one vector, whether it exists or not."""
        return self.layout.own(self.path / f"{_PREFIX[component]}{method}_layer{layer}.pt")

    def digest(self, component: str, method: str, layer: int) -> str:
        """A digest of one vector's file, which evaluation and steering record to recognise a replaced vector."""
        return blake2b(read_bytes(self.file(component, method, layer)), digest_size=8).hexdigest()

    def metadata_file(self, component: str, method: str | None = None) -> Path:
        """The path of the record of the vectors' origin; imported vectors have their own."""
        kind = f"{IMPORTED}_" if method == IMPORTED else ""
        return self.layout.own(self.path / f"{_PREFIX[component]}{kind}metadata.json")

    def mean_file(self, component: str) -> Path:
        """The path of the mean activations of the training examples."""
        return self.layout.own(self.path / f"{_PREFIX[component]}training_mean.pt")

    def metadata(self, component: str, method: str | None = None) -> dict[str, Any]:
        """The record of the vectors' origin, by a method; empty if another tool left none."""
        path = self.metadata_file(component, method)
        if not lexists(path):
            return {}
        value = read_json(path)
        checked(VectorMetadata, value, path, "vector metadata")
        return dict(value)

    def remove_all(self, component: str, methods: Iterable[str], layers: Iterable[int]) -> list[Path]:
        """Remove existing vectors of some methods and layers, and last the records of their origin.

        If the process is killed in between, the records still name what is left to remove.

        Returns the vectors' files that were removed.
        """
        wanted, of = list(layers), list(methods)
        files = [self.file(component, method, layer) for method in of for layer in wanted]
        existing = [path for path in files if lexists(path)]
        means = [self.mean_file(component)] if {*of} - {IMPORTED} else []
        remove([*existing, *means, *(self.metadata_file(component, method) for method in of)])
        return existing

    def write_metadata(self, component: str, metadata: Mapping[str, Any], method: str | None = None) -> None:
        """Write the record of the vectors' origin, by a method."""
        write_json(self.metadata_file(component, method), dict(metadata), indent=True)


def traits_with_vectors(layout: Layout, named: Sequence[Trait] = ()) -> list[Trait]:
    """The named traits, each once, or all traits with vectors if none is named.

    Raises `InputError` for an experiment without vectors, and for a named trait without any.
    """
    available = layout.traits()
    if not available and not named:
        raise no_vectors(layout)
    for trait in named:
        if trait not in available:
            raise no_vectors_of_trait(layout, trait)
    return list(dict.fromkeys(named)) or available


def check_available(
    layout: Layout,
    traits: Sequence[Trait],
    methods: Sequence[str],
    layers: Sequence[int],
    components: Sequence[str] = (*_PREFIX,),
    options: tuple[str, str] = ("--methods", "--layers"),
) -> None:
    """Raise `InputError` for a method or layer that is asked for, but that none of the traits has a vector of.

    `options` are the names under which they are asked for. Where none has any vector of the components there is nothing
    to compare with.
    """
    available = [VectorFiles(layout, trait).available(component) for trait in traits for component in components]
    known = list(dict.fromkeys(chain.from_iterable(available)))
    for method in methods if known else ():
        if method not in known:
            raise InputError(f"{options[0]} {method}: no trait has such vectors{beside(method, known, 'methods')}")
    by_method = [found[method] for found in available for method in methods or found if method in found]
    there = sorted(set(chain.from_iterable(by_method)))
    for layer in layers if there else ():
        if layer not in there:
            raise InputError(f"{options[1]} {layer}: there are vectors of {layers_named(there)}")
