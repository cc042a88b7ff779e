"""The errors for missing trait vectors. Each names the command that extracts them. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tlcapture.errors import InputError, VectorError
from tlcapture.models.embedded import NAME as EMBEDDED
from tlcapture.names import Trait
from tlcapture.storage.config import read_config
from tlcapture.storage.layout import Layout, shipped_datasets
from tlcapture.text import as_ranges, beside, did_you_mean

PACKAGED = "packaged"  # the name of the experiment that comes with the package


def extract_command(layout: Layout, traits: Iterable[object] = ()) -> str:
    """The command that extracts an experiment's vectors, of all traits if none is named."""
    named = ",".join(map(str, traits))
    experiment = "NAME" if layout.experiment == PACKAGED else layout.experiment  # nobody extracts into the package
    return f"tlcapture extract --experiment {experiment}" + (f" --traits {named}" if named else "")


def _place(layout: Layout) -> str:
    return "the package" if layout.experiment == PACKAGED else str(layout.folder)


def no_vectors(layout: Layout) -> InputError:
    """The error for an experiment without any vectors."""
    return InputError(f"experiment {layout.experiment!r} has no trait vectors: run '{extract_command(layout)}'")


def no_vectors_of_trait(layout: Layout, trait: Trait) -> InputError:
    """The error for a trait without vectors, naming the traits that have some, and the one that was probably meant."""
    traits = [*map(str, layout.traits())]
    extract = "" if did_you_mean(str(trait), traits) else f"; run '{extract_command(layout, [trait])}'"
    if extract and _has_packaged(layout, trait):
        extract += f", or take those that come with the package, vector experiment '{PACKAGED}'"
    return InputError(
        f"no vectors for trait {str(trait)!r} in {_place(layout)}{beside(str(trait), traits, 'available traits')}"
        f"{extract}"
    )


def _has_packaged(layout: Layout, trait: Trait) -> bool:
    """Whether a trait's vectors come with the package, for the model of an experiment that is not `packaged` itself."""
    is_theirs = layout.experiment != PACKAGED and read_config(layout).inference_model == EMBEDDED
    return is_theirs and (shipped_datasets() / PACKAGED / "vectors" / f"{trait}.safetensors").is_file()


def no_component_vectors(layout: Layout, component: str) -> InputError:
    """The error for an experiment whose vectors are all of another component."""
    return InputError(
        f"no {component} vectors in {_place(layout)}; available traits: {_available(layout)}; "
        f"run '{extract_command(layout)}'"
    )


def no_vectors_by_method(layout: Layout, trait: Trait, component: str, method: str | None) -> VectorError:
    """The error for a trait without vectors of a component, or without any by a method."""
    by = "" if method is None else f" by {method!r}"
    return VectorError(
        f"no {component} vectors{by} for {trait} in experiment {layout.experiment!r}: "
        f"run '{extract_command(layout, [trait])}'"
    )


def no_vector(
    layout: Layout, trait: Trait, component: str, method: str, layer: int, available: Mapping[str, Sequence[int]]
) -> VectorError:
    """The error for one missing vector; `available` holds the layers that have one, by method."""
    listed = "; ".join(f"{name}: {as_ranges(layers)}" for name, layers in available.items()) or "none"
    return VectorError(
        f"no {component} vector of {trait} by {method!r} at layer {layer} in experiment {layout.experiment!r}; "
        f"available layers: {listed}"
    )


def _available(layout: Layout) -> str:
    return ", ".join(map(str, layout.traits())) or "none"
