"""Choosing the vectors of an experiment that captures are projected onto, and writing the projections."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tlcapture.captures.capture import Capture
from tlcapture.captures.provenance import now
from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.names import Trait
from tlcapture.runs.run import Run
from tlcapture.storage.files import read_json, write_json
from tlcapture.storage.layout import Layout
from tlcapture.traits.origin import check_origin, origin_notes
from tlcapture.traits.projection import Projection, check_fits, check_kept, project
from tlcapture.traits.selection import Selection, select
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import TraitVector, read_vector
from tlcapture.views.kept import Kept

Chosen = Sequence[tuple[TraitVector, Selection]]


class Projectable(Protocol):
    """What vectors are chosen for: a capture, or what is left of one that was projected and not kept."""

    @property
    def prompt_set(self) -> str: ...
    @property
    def prompt_id(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def kept(self) -> Kept: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class VectorChoice:
    """How vectors are chosen: from which experiment, of which traits, at which layer, by which method."""

    layer: int | str = "auto"
    method: str | None = None
    experiment: str | None = None
    traits: tuple[Trait, ...] = ()

    def layout(self, layout: Layout) -> Layout:
        return layout if self.experiment is None else Layout(layout.root, self.experiment)


def traits_to_project(layout: Layout, choice: VectorChoice) -> list[Trait]:
    """The traits asked for, or all with vectors; raises `InputError` for one that has none."""
    source = choice.layout(layout)
    there = source.traits()
    if choice.experiment is not None and not there:
        raise InputError(f"--vector-experiment {choice.experiment!r} has no trait vectors in {source.folder}")
    for trait in choice.traits:
        if trait not in there:
            listed = ", ".join(map(str, there)) or "none; run 'tlcapture extract' first"
            raise InputError(f"no vectors for trait {str(trait)!r} in {source.folder}; traits there are: {listed}")
    return list(choice.traits) or there


class Chooser:
    """Chooses a vector for each trait, once for all captures of like measures and origin."""

    def __init__(self, run: Run, choice: VectorChoice):
        self._layout = run.layout
        self._run = run
        self._choice = choice
        self._chosen: dict[Hashable, Chosen] = {}

    def vectors(self, capture: Projectable, component: str) -> Chosen:
        """A vector for each trait that has one of the component; what goes wrong with a trait fails that trait."""
        origin = (capture.metadata.get("inference_model"), capture.metadata.get("weight_processing"))
        key = (component, capture.kept, capture.d_model, origin)
        if key not in self._chosen:
            self._chosen[key] = self._choose(component, capture)
            _warn(self._chosen[key], self._run)
        return self._chosen[key]

    def missing(self, capture: Projectable, component: str) -> Chosen:
        """Of these, the vectors onto which the capture is not projected yet, or was before it was made anew."""
        return [pair for pair in self.vectors(capture, component) if not self._is_projected(capture, *pair)]

    def _choose(self, component: str, capture: Projectable) -> Chosen:
        chosen, n_layers = [], capture.n_layers
        for trait in traits_to_project(self._layout, self._choice):
            folder = VectorFiles(self._choice.layout(self._layout), trait)
            if not folder.available(component) and not self._choice.traits:
                continue
            try:
                selection = select(folder, component, n_layers, layer=self._choice.layer, method=self._choice.method)
                vector = read_vector(folder, component, selection.method, selection.layer)
                check_fits(vector, n_layers, capture.d_model)
                check_kept(vector, capture.kept)
                check_origin(vector, capture.metadata)
            except TlcaptureError as error:
                self._run.failed(str(trait), error)
                continue
            chosen.append((vector, selection))
        return chosen

    def _is_projected(self, capture: Projectable, vector: TraitVector, selection: Selection) -> bool:
        layout, source = self._layout, self._choice.layout(self._layout)
        path = layout.projection(vector.trait, vector.component, capture.prompt_set, capture.prompt_id)
        raw = layout.residual(capture.prompt_set, capture.prompt_id)
        made_from = VectorFiles(source, vector.trait).file(vector.component, vector.method, vector.layer)
        newest = max(each.stat().st_mtime_ns for each in (raw, made_from) if each.is_file())
        if not path.is_file() or path.stat().st_mtime_ns < newest:
            return False
        try:
            written = read_json(path)["metadata"]["vector_source"]
            return all(written[key] == getattr(vector, key) for key in ("experiment", "method", "layer"))
        except (StorageError, KeyError, TypeError):
            return False


def _warn(chosen: Chosen, run: Run) -> None:
    """Pass on what is doubtful about selections, once for all traits of which the same is true."""
    _warn_together([(vector.trait, selection.warning) for vector, selection in chosen], run)


def _warn_together(doubts: Iterable[tuple[Trait, str | None]], run: Run) -> None:
    by_text: dict[str, list[str]] = {}
    for trait, text in doubts:
        if text:
            by_text.setdefault(text, []).append(str(trait))
    for text, traits in by_text.items():
        named = ", ".join(traits) if len(traits) <= 3 else f"{len(traits)} traits"
        run.warn(f"{named}: {text}")


def project_capture(
    run: Run,
    capture: Capture,
    chosen: Chosen,
    *,
    other_model_intended: bool,
    only: bool = False,
) -> list[Projection]:
    """Project a capture onto the vectors and write a file for each; returns the projections.

    Where projections are the `only` thing that is kept, the files hold the capture's metadata too.
    """
    layout = run.layout
    projections = project(capture.prompt.residual, capture.response.residual, chosen)
    doubts = [
        (projection.vector.trait, note)
        for projection in projections
        for note in origin_notes(projection.vector, capture.metadata, other_model_intended=other_model_intended)
    ]
    _warn_together(doubts, run)
    for projection in projections:
        vector = projection.vector
        said = [f"{trait}: {note}" for trait, note in doubts if trait == vector.trait]
        path = layout.projection(vector.trait, vector.component, capture.prompt_set, capture.prompt_id)
        content = _file_content(layout, capture, projection, said)
        if only:
            content["metadata"]["capture"] = dict(capture.metadata)
        run.wrote(write_json(path, content))
    return projections


def _file_content(layout: Layout, capture: Capture, projection: Projection, notes: list[str]) -> dict[str, Any]:
    parts = {"prompt": capture.prompt, "response": capture.response}
    metadata = {
        "inference_model": capture.metadata["inference_model"],
        "inference_experiment": layout.experiment,
        "prompt_id": capture.prompt_id,
        "prompt_set": capture.prompt_set,
        "vector_source": projection.source(),
        "layers": projection.layers,
        "sublayers": projection.sublayers,
        "projection_date": now(),
    }
    if notes:
        metadata["warnings"] = notes
    heads = {
        name: {"text": part.text, "tokens": part.tokens, "n_tokens": len(part.tokens)} for name, part in parts.items()
    }
    return {**heads, **projection.to_json(), "metadata": metadata}
