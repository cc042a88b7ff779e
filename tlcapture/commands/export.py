"""`tlcapture export`: an experiment in a form that others open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tlcapture.captures.capture import Capture
from tlcapture.captures.provenance import now
from tlcapture.errors import InputError, ModelError, StorageError
from tlcapture.exchange.card import card
from tlcapture.exchange.exported import (
    ChosenActivations,
    ExportedCapture,
    activation_column,
    column_of,
    read_exported,
)
from tlcapture.exchange.manifest import CARD, FORMAT_VERSION, MANIFEST, Format, Manifest, digests
from tlcapture.exchange.parquet import Columns, ParquetFolder
from tlcapture.exchange.single_files import SingleFiles
from tlcapture.exchange.vectors import ExportedVectors, export_vectors
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.missing_captures import no_captures
from tlcapture.storage.whole_folders import write_folder
from tlcapture.text import dtype_name, layers_named
from tlcapture.version import __version__
from tlcapture.views.hooks import POINTS

_PROVENANCE = (
    "inference_model",
    "model_fingerprint",
    "model_revision",
    "adapter",
    "engine",
    "dtype",
    "temperature",
    "seed",
    "max_new_tokens",
    "system_prompt",
    "variant",
    "tlcapture_version",
)


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how. Without prompt sets, all; `overwrite` replaces an earlier export at the same path."""

    to: Path
    format: Format = "datasets"
    prompt_sets: tuple[str, ...] = ()
    wanted: ChosenActivations = field(default_factory=ChosenActivations)
    shard_bytes: int = 500 * 2**20
    overwrite: bool = False


class _Writer(Protocol):
    def add(self, exported: ExportedCapture) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Seen:
    """What a first pass over all captures found."""

    scores: dict[str, None] = field(default_factory=dict)
    activations: dict[str, tuple[int, str]] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)
    provenance: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def columns(self) -> Columns:
        """The columns of tables that hold all captures; mixed dtypes become one that holds all values."""
        dtype = next(iter(self.dtypes), "float32") if len(self.dtypes) == 1 else "float32"
        order = {point: rank for rank, point in enumerate((*POINTS, "attn_out"))}
        places = sorted(self.activations.items(), key=lambda each: (each[1][0], order[each[1][1]]))
        return Columns(tuple(sorted(self.scores)), tuple(name for name, _ in places), dtype)


def run_export(run: Run, options: ExportOptions) -> Manifest:
    """Write an export of an experiment, complete or not at all.

    Raises:
        InputError: the experiment or a prompt set has nothing to export, or something else lies at the place.
        StorageError: a file of the experiment is damaged, or the export cannot be written.
        VectorError: a vector is damaged.
    """
    layout = run.layout
    layout.check_exists()
    files = list(_files(layout, options.prompt_sets))
    if not files and not layout.traits():
        raise InputError(
            f"experiment {layout.experiment!r} has neither captures nor vectors: "
            f"run '{command_line(layout, 'capture', '--prompt-set', 'NAME')}' first"
        )
    _check_free(options)
    seen = _look(layout, files, options.wanted)
    _check_activations(layout, options.wanted, seen)
    found: list[Manifest] = []
    write_folder(
        options.to, lambda folder: found.append(_fill(run, folder, files, seen, options)), replaces=options.overwrite
    )
    return found[0]


def _files(layout: Layout, prompt_sets: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Prompt set and name of all files to export."""
    existing = layout.prompt_sets()
    for name in prompt_sets:
        if name not in existing:
            raise no_captures(layout, name, existing)
    for name in prompt_sets or existing:
        for file in layout.prompt_ids(name):
            yield name, file


def _check_free(options: ExportOptions) -> None:
    to = options.to
    if not to.exists():
        return
    if not to.is_dir() or (any(to.iterdir()) and not (to / MANIFEST).is_file()):
        raise InputError(
            f"--to {to}: something else is there, which is not replaced: name a folder that does not exist"
        )
    if any(to.iterdir()) and not options.overwrite:
        raise InputError(
            f"--to {to}: an export is there already: pass --overwrite to replace it, or name another folder"
        )
    if not any(to.iterdir()):
        to.rmdir()


def _look(layout: Layout, files: list[tuple[str, str]], wanted: ChosenActivations) -> _Seen:
    """Find the columns that all captures need together, from their headers."""
    seen = _Seen()
    for prompt_set in dict.fromkeys(name for name, _ in files):
        for trait, component in layout.projection_folders(prompt_set):
            seen.scores[column_of(trait, component)] = None
    for prompt_set, file in files:
        path = layout.residual(prompt_set, file)
        if not path.is_file():
            continue
        try:
            capture = Capture.open(path)
        except StorageError:  # named when it is read as a whole
            continue
        stream = capture.prompt.residual
        for layer, point in wanted.of(stream):
            seen.activations[activation_column(layer, point)] = (layer, point)
            seen.dtypes[dtype_name(stream.points.dtype)] += 1
        for name in _PROVENANCE:
            value = capture.metadata.get(name)
            if value is not None:
                seen.provenance.setdefault(name, Counter())[str(value)] += 1
    return seen


def _check_activations(layout: Layout, wanted: ChosenActivations, seen: _Seen) -> None:
    if (wanted.layers or wanted.all_layers) and not seen.activations:
        layers = "all layers" if wanted.all_layers else f"{layers_named(wanted.layers)}"
        raise InputError(
            f"no capture of experiment {layout.experiment!r} holds {', '.join(wanted.points)} of {layers}: leave out "
            "--activations, or name what was captured"
        )


def _fill(run: Run, folder: Path, files: list[tuple[str, str]], seen: _Seen, options: ExportOptions) -> Manifest:
    layout, columns = run.layout, seen.columns
    is_tables = options.format in ("datasets", "parquet")
    writer: _Writer = (
        ParquetFolder(folder, columns, options.shard_bytes) if is_tables else SingleFiles(folder, f".{options.format}")
    )
    n_tokens = n_captures = 0
    with run.progress(len(files), "export", "capture") as progress:
        for prompt_set, file in files:
            with run.attempt(f"{prompt_set}/{file}"):
                exported = read_exported(layout, prompt_set, file, options.wanted)
                writer.add(exported)
                n_captures, n_tokens = n_captures + 1, n_tokens + int(exported.record["n_tokens"])
            progress.advance(1)
    writer.close()
    vectors = export_vectors(layout, folder, _model_type(layout))
    manifest = _manifest(layout, files, seen, options, vectors, (n_captures, n_tokens))
    manifest = manifest.model_copy(update={"sha256": digests(folder)})
    manifest.write(folder)
    if options.format == "datasets":
        text = card(manifest, columns.scores, _provenance(seen.provenance))
        (folder / CARD).write_text(text, encoding="utf-8")
    return manifest


def _provenance(found: Mapping[str, Counter[str]]) -> list[tuple[str, str]]:
    """The values in the captures' metadata, with counts where they differ."""
    rows = []
    for name, values in found.items():
        several = len(values) > 1
        shown = [f"{value} ({n} captures)" if several else value for value, n in values.most_common(5)]
        rows.append((name, "; ".join(shown).replace("|", "\\|").replace("\n", " ")))
    return rows


def _manifest(
    layout: Layout,
    files: list[tuple[str, str]],
    seen: _Seen,
    options: ExportOptions,
    vectors: ExportedVectors,
    counts: tuple[int, int],
) -> Manifest:
    config = read_config(layout)
    places = seen.activations.values()
    points = {point for _, point in places}
    return Manifest(
        format_version=FORMAT_VERSION,
        format=options.format,
        experiment=layout.experiment,
        model=config.inference_model or config.extraction_model,
        prompt_sets=list(dict.fromkeys(name for name, _ in files)),
        n_captures=counts[0],
        n_tokens=counts[1],
        traits=list(vectors.traits),
        layers=sorted({layer for layer, _ in places}),
        points=[point for point in (*POINTS, "attn_out") if point in points],
        dtype=seen.columns.dtype if places else None,
        left_out=[*_left_out(layout, files, seen), *vectors.left_out],
        files=list(vectors.files),
        export_date=now(),
        tlcapture_version=__version__,
    )


def _left_out(layout: Layout, files: list[tuple[str, str]], seen: _Seen) -> list[str]:
    """What the experiment has but no export holds, or this one leaves out."""
    kinds = {
        "attention": lambda name, file: layout.saved(layout.attention(name, file)).is_file(),
        "logit lens": lambda name, file: layout.saved(layout.logit_lens(name, file)).is_file(),
        "internals": lambda name, file: bool(layout.all_internals(name, file)),
    }
    found = [kind for kind, exists in kinds.items() if any(exists(name, file) for name, file in files)]
    notes = [f"{', '.join(found)}: 'tlcapture capture --replay' makes them again"] if found else []
    if not seen.activations and any(layout.residual(name, file).is_file() for name, file in files):
        notes.append("activations: pass --activations all --points all to include them")
    return notes


def _model_type(layout: Layout) -> str:
    """The architecture that control vectors are for, as a Hugging Face config names it, or `unknown`."""
    from tlcapture.models.checkpoints.checkpoint import fetch_config, quiet_loading
    from tlcapture.models.checkpoints.sources import source_of

    config = read_config(layout)
    name = config.extraction_model or config.inference_model
    if name is None:
        return "unknown"
    try:
        with quiet_loading():
            found: Any = fetch_config(name, source_of(name))
    except ModelError:
        return "unknown"
    return str(found.model_type)
