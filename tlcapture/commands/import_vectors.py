"""`tlcapture traits import`: vectors that another tool made become vectors of a trait, by the method `imported`."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from os.path import lexists
from pathlib import Path
from typing import Any

from tlcapture.captures.provenance import LAYERS, now
from tlcapture.errors import InputError, ModelError
from tlcapture.models.checkpoints.checkpoint import fetch_config, quiet_loading
from tlcapture.models.checkpoints.sources import source_of
from tlcapture.models.sizes import Measures
from tlcapture.names import Trait
from tlcapture.runs.display import Display
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import settle_model, update_config
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_bytes
from tlcapture.text import as_ranges, layers_named
from tlcapture.traits.vector_files import IMPORTED, VectorFiles
from tlcapture.traits.vector_sources.layer_conventions import Placed, place
from tlcapture.traits.vector_sources.other_tools import ToolVectors, read_tool_vectors
from tlcapture.traits.vectors import write_vector
from tlcapture.version import __version__
from tlcapture.views.hooks import COMPONENT_HOOKS


@dataclass(frozen=True)
class ImportOptions:
    """What to import, as which trait.

    `None` as `convention` or `component` means the file's own, and as `model` the experiment's.
    """

    path: Path
    trait: Trait
    convention: str | None = None
    component: str | None = None
    model: str | None = None
    overwrite: bool = False
    allow_model_change: bool = False


def run_import(layout: Layout, options: ImportOptions, display: Display = Display()) -> str:
    """Write the vectors of a file to the folder of a trait's vectors, with the record of where they come from.

    Nothing is written unless all of them are valid. Earlier imported vectors of the component are replaced.

    Returns:
        The vectors' component.

    Raises:
        InputError: the trait has imported vectors already, the convention is not known, or the model is another one.
        VectorError: a vector is damaged, or does not fit the model.
        StorageError: the file cannot be read.
    """
    found = read_tool_vectors(options.path)
    model = settle_model(layout, "extraction_model", options.model, "", allow_change=options.allow_model_change) or None
    measures, model_type, notes = _known_model(model, is_asked=options.model is not None)
    sizes = {} if measures is None else {"n_layers": measures.n_layers, "d_model": measures.d_model}
    placed = place(options.path, found, convention=options.convention, component=options.component, **sizes)
    files = VectorFiles(layout, options.trait)
    _check_free(files, placed.component, options.overwrite)
    run = Run.begin(layout, display)
    for note in [*notes, *_other_architecture(found, model_type), *placed.notes]:
        run.warn(note)
    if options.model is not None:
        update_config(layout, extraction_model=model)
    with run_lock(run, f"vectors of {options.trait}"):
        _write(run, files, placed, _metadata(layout, options, found, placed, model))
    _show(run, options, found, placed)
    return placed.component


def _known_model(model: str | None, *, is_asked: bool) -> tuple[Measures | None, str | None, list[str]]:
    """The sizes and the architecture of a model, or a note why they are not known."""
    unchecked = "width and layers of the vectors are only checked when they are used"
    if model is None:
        return None, None, [f"the experiment has no model yet (--model NAME): {unchecked}"]
    try:
        with quiet_loading():
            config = fetch_config(model, source_of(model))
    except ModelError as error:
        if is_asked:
            raise
        return None, None, [f"{error}; {unchecked}"]
    return Measures.of(config), str(config.model_type), []


def _other_architecture(found: ToolVectors, model_type: str | None) -> list[str]:
    said = found.model_type
    if None in (said, model_type) or said == model_type:
        return []
    return [f"the file says that its vectors come from a {said} model, the experiment's is {model_type}"]


def _check_free(files: VectorFiles, component: str, overwrite: bool) -> None:
    existing = files.available(component).get(IMPORTED)
    is_whole = lexists(files.metadata_file(component, IMPORTED))  # written last
    if existing and is_whole and not overwrite:
        raise InputError(
            f"{files.trait} has imported {component} vectors already, at {layers_named(existing)}: pass "
            "--overwrite to replace them, or import as another trait"
        )


def _write(run: Run, files: VectorFiles, placed: Placed, metadata: dict[str, Any]) -> None:
    component = placed.component
    # Before any is written: if the run is killed, vectors are of unknown origin rather than of a wrong one.
    removed = files.remove_all(component, [IMPORTED], files.available(component).get(IMPORTED, ()))
    for layer, vector in placed.vectors.items():
        run.wrote(write_vector(files, component, IMPORTED, layer, vector))
    files.write_metadata(component, metadata, IMPORTED)
    run.removed(removed)


def _metadata(
    layout: Layout, options: ImportOptions, found: ToolVectors, placed: Placed, model: str | None
) -> dict[str, Any]:
    return {
        "extraction_model": model,
        "extraction_experiment": layout.experiment,
        "trait": str(options.trait),
        "component": placed.component,
        "methods": [IMPORTED],
        "layers": list(placed.vectors),
        "num_layers": placed.n_layers,
        "hidden_dim": len(next(iter(placed.vectors.values()))),
        "timestamp": now(),
        "hook": COMPONENT_HOOKS[placed.component],
        "layer_convention": LAYERS,
        "tlcapture_version": __version__,
        "imported": {
            "tool": found.tool,
            "file": options.path.name,
            "digest": blake2b(read_bytes(options.path), digest_size=8).hexdigest(),
            "convention": placed.convention,
            "file_layers": [placed.file_layers[layer] for layer in placed.vectors],
            "left_out": list(placed.left_out),
            "notes": list(placed.notes),
            "model_type": found.model_type,
        },
    }


def _show(run: Run, options: ImportOptions, found: ToolVectors, placed: Placed) -> None:
    written_by = "" if found.tool is None else f", a file as {found.tool} writes it"
    counted = "" if placed.convention is None else f", counted as {placed.convention}"
    layers, theirs = as_ranges(placed.vectors), as_ranges(placed.file_layers.values())
    part = {"residual": "residual_out", "attn_out": "attn_out"}[placed.component]
    run.line(f"{options.path.name}{written_by}: layers {theirs}{counted}")
    run.line(f"{options.trait}: {part} of layers {layers}, method {IMPORTED}")
    for reason in placed.left_out:
        run.line(f"left out: {reason}")
