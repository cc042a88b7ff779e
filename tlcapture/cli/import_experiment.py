"""`tlcapture import`."""

from __future__ import annotations

from pathlib import Path

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import options_of
from tlcapture.cli.options.shared import Location
from tlcapture.cli.options.types import LocalPath
from tlcapture.cli.output.console import Console
from tlcapture.cli.work import working
from tlcapture.text import counted


@command("tlcapture import shared/my_exp --experiment copy", name="import")
@click.argument("folder", type=LocalPath(exists=True, file_okay=False))
@options_of(Location, "location")
@working
def import_experiment(console: Console, folder: Path, location: Location) -> None:
    """Recreate an experiment from FOLDER, which "tlcapture export" wrote.

    What was exported is restored bit for bit. Where activations were not exported, projections are restored, and
    raw captures are not.
    """
    from tlcapture.commands.import_experiment import run_import_experiment

    done = run_import_experiment(location.layout, folder, console)
    name = location.experiment
    console.line(
        f"experiments/{name}: {counted(done.n_captures, 'capture')}, "
        f"vectors of {counted(len(done.manifest.traits), 'trait')}, {counted(done.n_files, 'file')}"
    )
    if done.n_without_activations:
        console.line(
            f"{counted(done.n_without_activations, 'capture')} came without activations: "
            "only their projections were imported"
        )
    if done.n_empty:
        which = f"{counted(done.n_empty, 'capture')} came with neither activations nor projections"
        console.line(f"{which}: nothing was imported of them")
    console.next = location.command("view")
