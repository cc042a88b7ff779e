"""Choosing the vectors that activations are projected onto: one rule for the command line, the page and Python.

    choose_vectors(layout, VectorChoice(layer=12), capture, "residual").vectors

`traits/selection.py` selects one of a trait's vectors by its scores. This module reads it, and checks it against the
activations. The failures of some traits are part of the result, so that the others can still be projected.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from tlcapture.errors import NotKeptError, TlcaptureError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import as_ranges
from tlcapture.traits.missing_vectors import PACKAGED
from tlcapture.traits.origin import check_origin, origin_notes
from tlcapture.traits.projections.projection import check_fits, check_kept
from tlcapture.traits.selection import Selection, select
from tlcapture.traits.vector_files import VectorFiles, check_available, traits_with_vectors
from tlcapture.traits.vector_sources.packaged import takes_packaged, vectors_layout
from tlcapture.traits.vectors import TraitVector, read_vector
from tlcapture.views.kept_points import KeptPoints


@dataclass(frozen=True)
class VectorChoice:
    """The choice of vectors that the user asks for.

    Attributes:
        layer: a layer, or `auto`, the selected one.
        method: only vectors by this method.
        experiment: the experiment to take vectors from, if it is not the capture's own.
        traits: all traits with vectors where none is named.
        is_fallback: the packaged vectors' experiment was not asked for, so only captures of its model are projected.
        leaves_out_others: vectors whose activations a capture does not keep are left out with a warning, not failures.
    """

    layer: int | str = "auto"
    method: str | None = None
    experiment: str | None = None
    traits: tuple[Trait, ...] = ()
    is_fallback: bool = False
    leaves_out_others: bool = False

    def layout(self, layout: Layout) -> Layout:
        """The experiment that vectors are taken from, for captures in `layout`."""
        return layout if self.experiment is None else vectors_layout(layout.root, self.experiment)

    def or_packaged(self, layout: Layout, model: str | None) -> VectorChoice:
        """The packaged vectors, if `layout` has none, its model is theirs, and no other experiment is asked for."""
        if self.experiment is not None or not takes_packaged(layout, model):
            return self
        return replace(self, experiment=PACKAGED, is_fallback=True, leaves_out_others=self.is_default)

    def check(self, source: Layout, component: str) -> None:
        """Raise `InputError` for a method or layer of which no trait has a vector in the experiment `source`."""
        traits, names = self.traits or source.traits(), ("--method", "--layer")
        methods = [] if self.method is None else [self.method]
        layers = [self.layer] if isinstance(self.layer, int) else []
        check_available(source, traits, methods, layers, [component], names)

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked for."""
        return (self.layer, self.method, self.traits) == ("auto", None, ()) and (
            self.experiment is None or self.is_fallback
        )


@runtime_checkable
class Subject(Protocol):
    """The object that vectors are chosen for: a capture, or the facts about one whose activations were not saved."""

    @property
    def n_layers(self) -> int:
        """Layers of the model."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    def kept(self) -> KeptPoints:
        """The layers and residual points that are available."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata as a capture file holds them."""


@dataclass(frozen=True, eq=False)
class ChosenVector:
    """A trait's vector and how it was selected.

    `other_model_intended` states that the vector's experiment was named, so that another model is expected.
    """

    vector: TraitVector
    selection: Selection
    other_model_intended: bool = False

    def notes(self, capture: Mapping[str, Any]) -> list[str]:
        """The differences between the vector's origin and a capture's, given the capture's metadata."""
        return origin_notes(self.vector, capture, other_model_intended=self.other_model_intended)


@dataclass(frozen=True, eq=False)
class ChosenVectors:
    """A vector per trait, in the order of the traits, and why others have none.

    `warning` says that packaged vectors, which nobody asked for, are left out, and what to do.
    """

    vectors: Sequence[ChosenVector]
    failures: Sequence[tuple[Trait, TlcaptureError]]
    warning: str | None = None


def choose_vectors(source: Layout, choice: VectorChoice, subject: Subject, component: str) -> ChosenVectors:
    """Choose a vector for each trait, among those of the experiment `source`.

    Traits without vectors of the component are left out, unless they are named. The result is empty if the packaged
    vectors are a fallback and the captured model has other weights than theirs.

    Raises:
        InputError: a trait or an experiment that is asked for has no vectors at all.
    """
    is_asked_for = choice.traits or choice.experiment is not None
    traits = traits_with_vectors(source, choice.traits) if is_asked_for else source.traits()
    vectors: list[ChosenVector] = []
    failures: list[tuple[Trait, TlcaptureError]] = []
    left_out: list[int] = []  # their layers
    for trait in traits:
        files = VectorFiles(source, trait)
        if not choice.traits and not files.available(component):
            continue
        if choice.is_fallback and not _is_of(files, component, subject):
            continue
        try:
            vectors.append(choose_vector(files, choice, subject, component))
        except TlcaptureError as error:
            if choice.leaves_out_others and isinstance(error, NotKeptError):
                left_out.append(error.layer)
            else:
                failures.append((trait, error))
    return ChosenVectors(vectors, failures, _warning_of(left_out, len(vectors), subject.kept) if left_out else None)


def _warning_of(left_out: Sequence[int], n_others: int, kept: KeptPoints) -> str:
    """A warning of the packaged vectors at the layers `left_out`, each of which was not kept, with what to do."""
    layers = sorted(set(left_out))
    if set(layers) <= set(kept.layers):
        remedy = f"capture with --points {','.join([*kept.points, 'residual_out'])}"
    else:
        remedy = f"capture with --layers {','.join(map(str, sorted({*layers, *kept.layers})))}"
        remedy += ", or choose a layer that was kept with --layer"
    return (
        f"{len(left_out)} of {len(left_out) + n_others} packaged vectors left out, since residual_out of their "
        f"{'layers' if len(layers) > 1 else 'layer'} {as_ranges(layers)} was not kept: {remedy}"
    )


def choose_vector(files: VectorFiles, choice: VectorChoice, subject: Subject, component: str) -> ChosenVector:
    """Choose one trait's vector, and read it.

    Raises:
        VectorError: no vector matches, or the selected one is damaged or cannot belong to the activations.
        StorageError: a file with scores is damaged.
    """
    selection = select(files, component, subject.n_layers, layer=choice.layer, method=choice.method)
    vector = read_vector(files, component, selection.method, selection.layer)
    check_fits(vector, subject.n_layers, subject.d_model)
    check_kept(vector, subject.kept, subject.metadata.get("attention_layers"))
    check_origin(vector, subject.metadata)
    return ChosenVector(
        vector, selection, other_model_intended=choice.experiment is not None and not choice.is_fallback
    )


def _is_of(files: VectorFiles, component: str, subject: Subject) -> bool:
    """Whether a trait's vectors were extracted from the very weights that were captured."""
    return files.metadata(component).get("model_fingerprint") == subject.metadata.get("model_fingerprint")


class VectorChooser:
    """Chooses vectors once for all captures of the same shape and origin.

    `on_chosen` is called with each new choice, to report its failures and warnings once.
    """

    def __init__(
        self,
        layout: Layout,
        choice: VectorChoice,
        on_chosen: Callable[[ChosenVectors], None] = lambda chosen: None,
    ):
        self._source = choice.layout(layout)
        self._choice = choice
        self._on_chosen = on_chosen
        self._chosen: dict[Hashable, ChosenVectors] = {}

    def vectors(self, subject: Subject, component: str) -> Sequence[ChosenVector]:
        """The vector of each trait that has a fitting one."""
        names = ("inference_model", "model_fingerprint", "weight_processing")
        origin = tuple(subject.metadata.get(name) for name in names)
        key = (component, subject.kept, subject.d_model, origin)
        if key not in self._chosen:
            self._chosen[key] = choose_vectors(self._source, self._choice, subject, component)
            self._on_chosen(self._chosen[key])
        return self._chosen[key].vectors
