"""The errors for missing trait vectors. Each names the command that extracts them. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tlcapture.errors import InputError, VectorError
from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
from tlcapture.names import Trait
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.datasets import Datasets, shipped_datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import as_ranges, beside, did_you_mean, listed

PACKAGED = "packaged"  # the name of the experiment that comes with the package


def is_in_package(layout: Layout) -> bool:
    """Whether an experiment is `packaged`, unpacked from the package: nothing is saved or extracted into it."""
    return layout.experiment == PACKAGED and layout.root.parent == cache_folder()


def extract_command(layout: Layout, traits: Iterable[object] = (), method: str | None = None) -> str:
    """The command that extracts an experiment's vectors, of all traits if none is named.

    For the packaged vectors it names no experiment.
    """
    options = {"--traits": ",".join(map(str, traits)), "--methods": method or ""}
    words = [word for name, value in options.items() if value for word in (name, value)]
    if is_in_package(layout):
        return " ".join(["tlcapture extract", *words])
    return command_line(layout, "extract", *words)


def how_to_extract(layout: Layout, traits: Iterable[object] = (), method: str | None = None) -> str:
    """What to do for vectors that an experiment, or the package, does not have."""
    command = f"'{extract_command(layout, traits, method)}'"
    return f"extract your own in another experiment with {command}" if is_in_package(layout) else f"run {command}"


def no_vectors(layout: Layout) -> InputError:
    """The error for an experiment without any vectors."""
    return InputError(f"experiment {layout.experiment!r} has no trait vectors: {how_to_extract(layout)}")


def no_vectors_of_trait(layout: Layout, trait: Trait, packaged: str = f"vector experiment {PACKAGED!r}") -> InputError:
    """The error for a trait without vectors, naming the traits that have some, and the one that was probably meant.

    Where the package has vectors of the trait, `packaged` says how to take them.
    """
    traits = [*map(str, layout.traits())]
    extract = "" if did_you_mean(str(trait), traits) else f"; {_how_to_get(layout, trait)}"
    if extract and has_packaged(layout, trait):
        extract += f", or take those that come with the package, {packaged}"
    return InputError(
        f"no vectors for trait {str(trait)!r} in {_source(layout)}{beside(str(trait), traits, 'available traits')}"
        f"{extract}"
    )


def _how_to_get(layout: Layout, trait: Trait) -> str:
    examples = [*map(str, Datasets(layout.root).traits())]
    if is_in_package(layout) or str(trait) in examples:
        return how_to_extract(layout, [trait])
    return f"nor are there examples, in datasets/traits/{trait}{beside(str(trait), examples, 'traits with examples')}"


def has_packaged(layout: Layout, trait: Trait) -> bool:
    """Whether a trait's vectors come with the package, for the model of an experiment that is not `packaged` itself."""
    is_theirs = not is_in_package(layout) and read_config(layout).inference_model == EMBEDDED
    return is_theirs and (shipped_datasets() / PACKAGED / "vectors" / f"{trait}.safetensors").is_file()


def no_component_vectors(layout: Layout, component: str) -> InputError:
    """The error for an experiment whose vectors are all of another component."""
    return InputError(
        f"no {component} vectors in {_source(layout)}; available traits: {_available(layout)}; {how_to_extract(layout)}"
    )


def no_vectors_by_method(
    layout: Layout,
    trait: Trait,
    component: str,
    method: str | None,
    available: Sequence[str] = (),
    known: Sequence[str] = (),
) -> VectorError:
    """The error for a trait without vectors of a component, or without any by a method.

    `available` holds the methods that it has vectors by, and `known` those by which vectors are extracted.
    """
    extract = how_to_extract(layout, [trait], method if method in known else None)
    if method is None or not available:
        return VectorError(f"no {component} vectors for {trait} in {_source(layout)}: {extract}")
    there = beside(method, available, "available methods")
    return VectorError(
        f"no {component} vectors by {method!r} for {trait} in {_source(layout)}{there}"
        + (f"; {extract}" if method in known else "")
    )


def no_vector(
    layout: Layout, trait: Trait, component: str, method: str, layer: int, available: Mapping[str, Sequence[int]]
) -> VectorError:
    """The error for one missing vector; `available` holds the layers that have one, by method."""
    listed = "; ".join(f"{name}: {as_ranges(layers)}" for name, layers in available.items()) or "none"
    return VectorError(
        f"no {component} vector of {trait} by {method!r} at layer {layer} in {_source(layout)}; "
        f"available layers: {listed}"
    )


def _source(layout: Layout) -> str:
    return "the package" if is_in_package(layout) else f"experiment {layout.experiment!r}"


def _available(layout: Layout) -> str:
    return listed(map(str, layout.traits()))
