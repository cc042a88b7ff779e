"""Writing the projections of captures, and warning about doubtful ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.captures.provenance import now, sample_record, variant_record
from tlcapture.commands.projecting.top_traits import essentials
from tlcapture.commands.prompt_files.known_files import PromptFiles
from tlcapture.commands.prompt_files.projection_writing import ProjectionFiles
from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.names import Trait
from tlcapture.runs.display import Display
from tlcapture.runs.existing_files import check_replaceable
from tlcapture.runs.report import CollectingReport, Done
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState, as_json
from tlcapture.traits.centring import Centred
from tlcapture.traits.choice import ChosenVector, ChosenVectors, VectorChoice, VectorChooser
from tlcapture.traits.mean_activations import mean_activation
from tlcapture.traits.projections.projection import Projection, project, projections_to_json, scores_of
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.statistics.reference import Reference, read_reference
from tlcapture.traits.statistics.rises import DEFINITIONS
from tlcapture.traits.statistics.span_dynamics import by_span
from tlcapture.traits.vector_sources.packaged import vectors_layout
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import Positions

TOKENS_MISSING = "some captures hold only part of their tokens (--tokens): values that need the others are null"


@dataclass(frozen=True)
class ExistingProjections:
    """Which existing projections are kept where only missing ones are made.

    Attributes:
        onto_any: keep projections onto any vector of the trait, not only onto the chosen one.
        centred: keep projections from which the mean activation was subtracted, not those from which it was not.
        overwrite: replace files that cannot be read; otherwise such a file is an error.
    """

    onto_any: bool = False
    overwrite: bool = False
    centred: bool = False


def vector_chooser(run: Run, choice: VectorChoice) -> VectorChooser:
    """A chooser of vectors whose failures and warnings are reported on a run."""
    return VectorChooser(run.layout, choice, on_chosen=partial(report_choice, run))


def without_projection(
    files: PromptFiles, chosen: Sequence[ChosenVector], existing: ExistingProjections
) -> list[ChosenVector]:
    """The vectors without a projection of a capture, or with one older than the capture or the vector.

    Raises `StorageError` for a projection file that cannot be read and is not to be overwritten.
    """
    return [each for each in chosen if not _is_projected(files, each.vector, existing)]


def scores_among(
    capture: Capture, chosen: Sequence[ChosenVector], wanted: Sequence[ChosenVector], device: torch.device | None = None
) -> list[Tensor]:
    """The result of `scores_of` for the wanted ones of the chosen vectors.

    A product rounds differently with fewer vectors: of a run that is resumed, scores are those of all vectors together.
    """
    vectors = [each.vector for each in chosen]
    scores = scores_of(capture.prompt.residual, capture.response.residual, vectors, device)
    rows = [row for row, each in enumerate(chosen) if any(each is other for other in wanted)]
    return scores if len(rows) == len(chosen) else [part[rows] for part in scores]


def _is_projected(files: PromptFiles, vector: TraitVector, existing: ExistingProjections) -> bool:
    """Whether a prompt has a projection that is kept, no older than the raw capture and the vector it is onto."""
    saved = files.projection(vector.trait, vector.component, overwrite=existing.overwrite)
    if saved is None:
        return False
    is_onto_it = all(saved.source.get(key) == getattr(vector, key) for key in ("experiment", "method", "layer"))
    is_as_wanted = is_onto_it and bool(saved.source.get("centred")) == existing.centred
    if not (is_as_wanted or existing.onto_any):
        return False
    return saved.written_ns >= max(files.captured_ns, files.vector_ns(vector) if is_onto_it else 0)


def report_choice(run: Run, chosen: ChosenVectors) -> None:
    """Report the failures and warnings of a choice of vectors on a run."""
    for trait, error in chosen.failures:
        run.failed(str(trait), error)
    if chosen.warning:
        run.warn(chosen.warning)
    warn_together([(each.vector.trait, each.selection.warning) for each in chosen.vectors], run)


@dataclass
class ChanceLevels:
    """The random directions to compare a capture with: one set for each experiment of vectors and component."""

    run: Run
    _made: dict[Hashable, RandomDirections] = field(default_factory=dict)

    def reporting_to(self, run: Run) -> ChanceLevels:
        """A copy whose warnings go to another run."""
        return replace(self, run=run)

    def of(self, capture: Capture, chosen: Sequence[ChosenVector]) -> RandomDirections | None:
        """The directions for a capture and the vectors that it is projected onto; `None` without vectors."""
        if not chosen:
            return None
        vector, stream = chosen[0].vector, capture.prompt.residual
        shape = stream.n_layers, stream.points.shape[-1]
        key = (vector.experiment, vector.component, shape)
        if key not in self._made:
            source = vectors_layout(self.run.layout.root, vector.experiment)
            self._made[key] = random_directions(source, vector.component, *shape, self.run.warn)
            if _is_of_other_weights(self._made[key].reference, capture.metadata):
                self.run.warn(
                    f"the reference prompts of experiment {vector.experiment!r} ran on other weights than these "
                    "captures: rises and chance levels are measured against those weights"
                )
        return self._made[key]


def _is_of_other_weights(reference: Reference | None, capture: Mapping[str, Any]) -> bool:
    """Whether a reference ran on other weights than a capture, with its metadata, and than its adapter's base."""
    own = [str(capture[name]) for name in ("model_fingerprint", "base_fingerprint") if capture.get(name)]
    if reference is None or not own or own[0].startswith("tl-") != reference.model_fingerprint.startswith("tl-"):
        return False  # a model that the user loaded has a fingerprint of another kind
    return reference.model_fingerprint not in own


def random_directions(
    source: Layout, component: str, n_layers: int, d_model: int, warn: Callable[[str], object]
) -> RandomDirections:
    """The random directions to compare vectors of an experiment with; warns of a reference that cannot be read."""
    try:
        reference = read_reference(source, component)
    except StorageError as error:
        warn(str(error))
        reference = None
    fits = reference is not None and reference.fits(n_layers, d_model)
    return RandomDirections(reference if fits else None, n_layers, d_model)


def project_capture(
    run: Run,
    capture: Capture,
    chosen: Sequence[ChosenVector],
    levels: ChanceLevels,
    *,
    with_metadata: bool = False,
    centred: bool = False,
    overwrite: bool = False,
    kept: Positions | None = None,
    scores: Sequence[Tensor] | None = None,
    form: str | None = None,
) -> list[Projection]:
    """Project a capture onto vectors and write a file for each, or a shard for all; returns the projections.

    Args:
        with_metadata: store the capture's metadata in the files, because no raw file has it.
        centred: subtract the mean activation of each vector's training examples first.
        overwrite: replace files that cannot be read.
        kept: the tokens whose scores are stored, by default all that the capture holds; all of these are projected.
        scores: the result of `scores_of`, if known.
        form: the form of the files, as in `ViewParts`.

    Raises:
        StorageError: a file to be replaced cannot be read, and `overwrite` is not set; none was written.
    """
    layout = run.layout
    where = (capture.capture_set, capture.name)
    paths = [layout.projection(each.vector.trait, each.vector.component, *where) for each in chosen]
    for path in paths:
        check_replaceable(layout, path, overwrite=overwrite)
    files = ProjectionFiles(run, capture.capture_set, capture.name, form)
    files.check_replaceable(overwrite=overwrite)
    pairs = [(each.vector, each.selection) for each in chosen]
    prompt, response = capture.prompt.residual, capture.response.residual
    centre = partial(mean_activation, layout.root) if centred else None
    held, random = capture.positions, levels.of(capture, chosen)
    if chosen and not held.is_all:
        run.warn(TOKENS_MISSING)
    projections = project(prompt, response, pairs, random=random, centre=centre, held=held, scores=scores)
    notes = [each.notes(capture.metadata) for each in chosen]
    doubts = [(each.vector.trait, note) for each, texts in zip(chosen, notes, strict=True) for note in texts]
    warn_together(doubts, run)
    in_spans = span_dynamics(projections, capture)
    shared, folder = _CaptureContent.of(layout, capture, with_metadata=with_metadata), layout.folder.as_posix()
    in_json = projections_to_json(projections, kept or held)
    for path, projection, texts, of_spans, values in zip(paths, projections, notes, in_spans, in_json, strict=True):
        content = shared.content(projection, values, texts, of_spans, kept or held)
        files.add(path, projection.vector, content)
        if run.report.remembers:
            run.report.remember({path.as_posix().removeprefix(f"{folder}/"): essentials(content)})
    files.write()
    return projections


def span_dynamics(projections: Sequence[Projection], capture: Capture) -> list[list[dict[str, Any]]]:
    """The dynamics of each projection of a capture within each of its spans."""
    if not capture.spans:
        return [[] for _ in projections]
    trajectories = [projection.movement.numpy() for projection in projections]
    return by_span(np.stack(trajectories), capture.spans)


@dataclass(frozen=True, eq=False)
class ProjectionTask:
    """The projection of a saved capture by another process: its file, the vectors, and the scores.

    `chosen` are pickled vectors, which a process unpickles once; `remembers` is whether the report of the run has
    room for what its summary needs.
    """

    layout: Layout
    raw: Path
    chosen: bytes
    scores: Sequence[NDArray[np.float32]]
    overwrite: bool
    remembers: bool
    form: str | None = None

    def do(self) -> tuple[Done, TlcaptureError | None]:
        """Write the projections; returns what was done, and the error that ended it."""
        report, error = CollectingReport(self.layout.folder, whole_remembers=self.remembers), None
        run = Run(self.layout, report, Display())
        try:
            capture = Capture.open(self.raw)
            scores = [torch.from_numpy(each) for each in self.scores]
            chosen = _unpickled(self.chosen)
            levels = _levels_of(self.layout, _reference_state(self.layout, chosen[0].vector)).reporting_to(run)
            project_capture(run, capture, chosen, levels, overwrite=self.overwrite, scores=scores, form=self.form)
        except TlcaptureError as caught:
            error = caught
        return report.drain(), error


@lru_cache(maxsize=4)
def _unpickled(chosen: bytes) -> Sequence[ChosenVector]:
    vectors: Sequence[ChosenVector] = pickle.loads(chosen)
    return vectors


@lru_cache(maxsize=4)
def _levels_of(layout: Layout, _reference: FileState | None) -> ChanceLevels:
    return ChanceLevels(Run.silent(layout))


def _reference_state(layout: Layout, vector: TraitVector) -> FileState | None:
    path = vectors_layout(layout.root, vector.experiment).reference(vector.component)
    return FileState.of(path.stat()) if path.is_file() else None


def massive_line(centred: Sequence[tuple[Trait, Centred]]) -> str:
    """A line of text: the share of centred projections' variance in massive dimensions, on average, by trait."""
    by_trait: dict[str, list[float]] = {}
    for trait, centring in centred:
        if centring.variance_share is not None:
            by_trait.setdefault(str(trait), []).append(centring.variance_share)
    shares = [f"{trait} {sum(values) / len(values):.0%}" for trait, values in by_trait.items()]
    dimensions = sorted({number for _, centring in centred for number in centring.massive_dimensions or ()})
    named = ", ".join(map(str, dimensions[:8])) + (", ..." if len(dimensions) > 8 else "")
    return f"massive dimensions ({named or 'none'}) carry of the variance: {', '.join(shares)}"


def warn_together(doubts: Iterable[tuple[Trait, str | None]], run: Run) -> None:
    """Warn once for all traits that the same doubt applies to."""
    by_text: dict[str, list[str]] = {}
    for trait, text in doubts:
        if text:
            by_text.setdefault(text, []).append(str(trait))
    for text, traits in by_text.items():
        named = ", ".join(traits) if len(traits) <= 3 else f"{len(traits)} traits"
        run.warn(f"{named}: {text}")


@dataclass(frozen=True)
class _CaptureContent:
    """The content that all projection files of a capture share.

    Attributes:
        heads: text and tokens of prompt and response, as JSON.
        names: the beginning of the metadata: model, experiment, prompt.
        metadata: the metadata of the capture where no raw file holds it.
    """

    heads: Mapping[str, Any]
    names: Mapping[str, Any]
    date: str
    spans: Sequence[Mapping[str, Any]]
    metadata: Mapping[str, Any] | None

    @classmethod
    def of(cls, layout: Layout, capture: Capture, *, with_metadata: bool) -> _CaptureContent:
        parts = {"prompt": capture.prompt, "response": capture.response}
        heads = {
            name: as_json({"text": part.text, "tokens": part.tokens, "n_tokens": len(part.tokens)})
            for name, part in parts.items()
        }
        names = {
            "inference_model": capture.metadata["inference_model"],
            "inference_experiment": layout.experiment,
            "prompt_id": capture.prompt_id,
            **sample_record(capture.sample),
            "prompt_set": capture.prompt_set,
            **variant_record(capture.metadata.get("variant"), capture.metadata.get("interventions") or ()),
        }
        spans = [span.to_json() for span in capture.spans]
        return cls(heads, names, now(), spans, dict(capture.metadata) if with_metadata else None)

    def content(
        self,
        projection: Projection,
        values: Mapping[str, Any],
        notes: Sequence[str],
        in_spans: Sequence[Mapping[str, Any]],
        kept: Positions,
    ) -> dict[str, Any]:
        """The content of a projection's file; `values` are `projections` and `dynamics`."""
        content = {**self.heads, **values, "metadata": self._metadata(projection, notes, kept)}
        if self.spans:
            content["spans"] = self.spans
            content["dynamics"]["by_span"] = in_spans
        if self.metadata is not None:
            content["metadata"]["capture"] = self.metadata
        return content

    def _metadata(self, projection: Projection, notes: Sequence[str], kept: Positions) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            **self.names,
            "vector_source": projection.source(),
            "layers": projection.layers,
            "sublayers": projection.sublayers,
            "definitions": DEFINITIONS,
            "projection_date": self.date,
            **kept.record(),
        }
        if projection.still_from is not None or not kept.is_all:
            metadata["means"] = projection.means()
        if projection.chance is not None:
            metadata["chance"] = as_json(projection.chance.to_json())
        if projection.centred is not None:
            metadata["centered"] = projection.centred.to_json()
        if notes:
            metadata["warnings"] = [f"{projection.vector.trait}: {note}" for note in notes]
        return metadata
