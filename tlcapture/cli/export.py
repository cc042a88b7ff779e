"""`tlcapture export`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import option, options_of
from tlcapture.cli.options.shared import Location
from tlcapture.cli.options.types import ByteSize, LayersOrNone, LocalPath, PromptSets, StreamPoints
from tlcapture.cli.output.console import Console
from tlcapture.cli.work import working
from tlcapture.text import counted, format_bytes, layers_named, shell_join

if TYPE_CHECKING:
    from tlcapture.exchange.manifest import Format, Manifest


@dataclass(frozen=True)
class _Settings:
    """The options of `export` alone."""

    prompt_set: tuple[str, ...] | None = option(
        "--prompt-set", type=PromptSets(), help="Prompt sets, comma-separated.  [default: all with captures]"
    )
    to: Path = option(
        "--to",
        type=LocalPath(),
        metavar="DIR",
        required=True,
        help="Folder to write; it must not exist, unless --overwrite is given.",
    )
    format: Format = option(
        "--format",
        type=click.Choice(["datasets", "parquet", "safetensors", "json"]),
        default="datasets",
        show_default=True,
        help="datasets: Parquet with a card, for datasets.load_dataset; parquet: without one; safetensors, json: a "
        "file for each capture.",
    )
    activations: tuple[int, ...] | None = option(
        "--activations",
        type=LayersOrNone(),
        default="none",
        show_default=True,
        help="Layers to export activations of.",
    )
    points: tuple[str, ...] = option(
        "--points",
        type=StreamPoints(),
        default="residual_out",
        show_default=True,
        help="Points to export activations at: residual_in, after_attn, residual_out, attn_out.",
    )
    shard_size: int = option(
        "--shard-size",
        type=ByteSize(),
        default="500MiB",
        show_default=True,
        help="Size at which a new Parquet file begins.",
    )
    overwrite: bool = option("--overwrite", is_flag=True, help="Replace an earlier export in the same folder.")


@command(
    "tlcapture export --experiment my_exp --to shared/my_exp",
    "tlcapture export --experiment my_exp --to shared/with_layers --activations 12,16",
)
@options_of(Location, "location")
@options_of(_Settings, "settings")
@working
def export(console: Console, location: Location, settings: _Settings) -> None:
    """Write an experiment in a form that other tools open: tokens, spans, scores and vectors, activations on request.

    Vectors are written as safetensors and as GGUF control vectors. "tlcapture import" makes an experiment of it again.
    """
    location.layout.check_exists()
    from tlcapture.commands.export import ExportOptions, run_export
    from tlcapture.exchange.exported import ChosenActivations
    from tlcapture.runs.report import RunReport
    from tlcapture.runs.run import Run

    layers = settings.activations
    options = ExportOptions(
        to=settings.to,
        format=settings.format,
        prompt_sets=settings.prompt_set or (),
        wanted=ChosenActivations(layers or (), layers == (), settings.points),
        shard_bytes=settings.shard_size,
        overwrite=settings.overwrite,
    )
    # Nothing is written to the experiment, and so no record of the run.
    run = Run(location.layout, RunReport(location.layout.folder), console)
    _show(console, location.root, settings, run_export(run, options))
    for failure in run.report.failures:
        console.error(f"failed: {failure}")
    if run.report.failures:
        sys.exit(1)


def _show(console: Console, root: Path, settings: _Settings, manifest: Manifest) -> None:
    from tlcapture.storage.experiments.command_lines import root_words

    size = sum(path.stat().st_size for path in settings.to.rglob("*") if path.is_file())
    console.line(
        f"{settings.to}: {counted(manifest.n_captures, 'capture')} of "
        f"{counted(len(manifest.prompt_sets), 'prompt set')}, "
        f"{manifest.n_tokens} tokens, vectors of {counted(len(manifest.traits), 'trait')}, {format_bytes(size)}"
    )
    if manifest.layers:
        console.line(f"activations: {', '.join(manifest.points)} of {layers_named(manifest.layers)}, {manifest.dtype}")
    for each in manifest.left_out:
        console.line(f"not exported: {each}")
    if manifest.format == "datasets":
        console.line(f"open it with datasets.load_dataset({str(settings.to)!r}, split='train')")
    console.next = shell_join(["tlcapture", "import", str(settings.to), "--experiment", "copy", *root_words(root)])
