"""`tlcapture list`: what a root holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.completion import experiments
from tlcapture.cli.options.shared import DEFAULT_EXPERIMENT, Location, root_option
from tlcapture.cli.output.console import Console, one_line_errors
from tlcapture.cli.output.tables import Column, echo_table
from tlcapture.errors import StorageError, TlcaptureError, refused_path
from tlcapture.text import printable

if TYPE_CHECKING:
    from tlcapture.storage.experiments.layout import Layout

_MOST_RUNS = 5


@command("tlcapture list", "tlcapture list --experiment my_exp", name="list")
@click.option("--experiment", metavar="NAME", shell_complete=experiments, help="Show this experiment's sets and runs.")
@root_option
@one_line_errors
def list_experiments(experiment: str | None, root: Path) -> None:
    """List the experiments of a root; or the prompt sets, traits and last runs of one."""
    if experiment is None:
        _list_all(root)
    else:
        _list_one(root, experiment)


def _list_all(root: Path) -> None:
    from tlcapture.storage.experiments.layout import Layout, existing_experiments

    names = existing_experiments(root)
    if not names:
        click.echo(printable(f"no experiments in {root / 'experiments'}"))
        click.echo(f"next: {Location(DEFAULT_EXPERIMENT, root).command('capture', '--prompt', 'How do tides work?')}")
        return
    rows: list[tuple[str, ...]] = []
    refused: list[TlcaptureError] = []
    for name in names:
        try:
            rows.append(_row(Layout(root, name)))
        except TlcaptureError as error:
            refused.append(error)
        except OSError as error:
            refused.append(refused_path(error))
    echo_table(
        [
            Column("experiment"),
            Column("model"),
            *(Column(each, right=True) for each in ("prompt sets", "captures", "traits")),
        ],
        rows,
    )
    for reason in refused:
        Console().error(f"failed: {reason}")
    if refused:
        sys.exit(1)
    click.echo(f"next: {Location(names[0], root).command('list')}")


def _row(layout: Layout) -> tuple[str, ...]:
    """Name, model, and numbers of prompt sets, captures and traits of an experiment."""
    from tlcapture.storage.experiments.config import read_config

    layout.check_exists()
    config = read_config(layout)
    sets = layout.prompt_sets()
    n_captures = sum(len(layout.prompt_ids(each)) for each in sets)
    model = config.inference_model or config.extraction_model or "-"
    return (
        layout.experiment,
        printable(Path(model).name or model),
        f"{len(sets)}",
        f"{n_captures}",
        f"{len(layout.traits())}",
    )


def _list_one(root: Path, name: str) -> None:
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.vector_sources.packaged import listed_vectors

    layout = Layout(root, name)
    layout.check_exists()
    sets = layout.prompt_sets()
    if sets:
        traits = {each: {trait for trait, _ in layout.projection_folders(each)} for each in sets}
        rows = [(each, f"{len(layout.prompt_ids(each))}", f"{len(traits[each])}") for each in sets]
        echo_table([Column("prompt set"), Column("captures", right=True), Column("projected onto", right=True)], rows)
    else:
        click.echo("no captures")
    click.echo(listed_vectors(layout))
    runs = _runs(layout.folder)
    if runs:
        click.echo()
        echo_table([Column("last runs"), Column("status"), Column("command")], runs)
    click.echo(f"next: {Location(name, root).command('view')}")


def _runs(folder: Path) -> list[tuple[str, ...]]:
    """Time, status and command line of the last runs; damaged records are left out."""
    from tlcapture.runs.record import status_of
    from tlcapture.storage.files import read_json

    found = []
    for path in sorted((folder / "runs").glob("*.json"))[-_MOST_RUNS:]:
        try:
            record = read_json(path)
            row = (record["started"], status_of(record), record["command_line"])
        except (StorageError, KeyError, TypeError, ValueError, AttributeError):
            continue
        found.append(tuple(printable(str(cell)) for cell in row))
    return found
