"""Writing the projections of captures, and warning about doubtful ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.captures.provenance import now
from tlcapture.commands.capture_records import CaptureRecord
from tlcapture.names import Trait
from tlcapture.runs.run import Run
from tlcapture.storage.files import write_json
from tlcapture.storage.layout import Layout
from tlcapture.traits.choice import ChosenVector, ChosenVectors, VectorChoice, VectorChooser
from tlcapture.traits.projection import Projection, project
from tlcapture.traits.saved_projections import is_projected


def vector_chooser(run: Run, choice: VectorChoice) -> VectorChooser:
    """A chooser of vectors whose failures and warnings are reported on a run."""
    return VectorChooser(run.layout, choice, on_chosen=partial(_report, run))


def without_projection(
    layout: Layout, capture: Capture | CaptureRecord, chosen: Sequence[ChosenVector]
) -> list[ChosenVector]:
    """The vectors without a projection of the capture, or with one older than the capture or the vector."""
    ids = (capture.prompt_set, capture.prompt_id)
    return [each for each in chosen if not is_projected(layout, *ids, each.vector)]


def _report(run: Run, chosen: ChosenVectors) -> None:
    for trait, error in chosen.failures:
        run.failed(str(trait), error)
    _warn_together([(each.vector.trait, each.selection.warning) for each in chosen.vectors], run)


def project_capture(
    run: Run, capture: Capture, chosen: Sequence[ChosenVector], *, only: bool = False
) -> list[Projection]:
    """Project a capture onto vectors and write a file for each; returns the projections.

    Where `only` projections are kept, the files hold the capture's metadata too.
    """
    layout = run.layout
    pairs = [(each.vector, each.selection) for each in chosen]
    projections = project(capture.prompt.residual, capture.response.residual, pairs)
    notes = [each.notes(capture.metadata) for each in chosen]
    doubts = [(each.vector.trait, note) for each, found in zip(chosen, notes, strict=True) for note in found]
    _warn_together(doubts, run)
    for projection, found in zip(projections, notes, strict=True):
        vector = projection.vector
        path = layout.projection(vector.trait, vector.component, capture.prompt_set, capture.prompt_id)
        content = _file_content(layout, capture, projection, [f"{vector.trait}: {note}" for note in found])
        if only:
            content["metadata"]["capture"] = dict(capture.metadata)
        run.wrote(write_json(path, content))
    return projections


def _warn_together(doubts: Iterable[tuple[Trait, str | None]], run: Run) -> None:
    """Warn once for all traits that the same doubt applies to."""
    by_text: dict[str, list[str]] = {}
    for trait, text in doubts:
        if text:
            by_text.setdefault(text, []).append(str(trait))
    for text, traits in by_text.items():
        named = ", ".join(traits) if len(traits) <= 3 else f"{len(traits)} traits"
        run.warn(f"{named}: {text}")


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
