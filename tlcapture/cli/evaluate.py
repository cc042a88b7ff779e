"""`tlcapture evaluate`."""

from __future__ import annotations

from os.path import lexists
from typing import TYPE_CHECKING

import click

from tlcapture.cli.cluster import ClusterOptions, cluster_options
from tlcapture.cli.console import Console
from tlcapture.cli.options import (
    HELP_NAMES,
    GridOptions,
    Location,
    ModelOptions,
    batch_size_option,
    examples_as_option,
    grid_options,
    location_options,
    model_options,
    seed_option,
)
from tlcapture.cli.tables import Column
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.storage.layout import Layout
    from tlcapture.traits.evaluation_files import EvaluationRow


@click.command(context_settings=HELP_NAMES)
@location_options
@grid_options("evaluate", "probe,mean_diff,gradient,imported")
@click.option(
    "--against-steering",
    is_flag=True,
    help="Evaluate nothing; compare effect sizes with steering results, layer by layer.",
)
@examples_as_option
@model_options
@cluster_options
@batch_size_option
@seed_option
@working
def evaluate(
    console: Console,
    location: Location,
    grid: GridOptions,
    against_steering: bool,
    examples_as: str,
    batch_size: int | None,
    seed: int,
    model: ModelOptions,
    cluster: ClusterOptions,
) -> None:
    """Measure how well trait vectors separate held-out examples."""
    from tlcapture.traits.vector_files import traits_with_vectors

    layout = location.layout
    layout.check_exists()
    if against_steering:
        _compare(console, layout, grid.traits or ())
        return
    traits_with_vectors(layout, grid.traits or ())
    load = model.loader_for(layout, "extraction_model", console)
    load.require()
    from tlcapture.commands.evaluate import EvaluateOptions, best_rows, draw_heatmaps, run_evaluate

    executor = cluster.make_executor(can_collect=False)
    traits = grid.traits or ()
    options = EvaluateOptions(traits, grid.methods, grid.layers, grid.component, batch_size, seed, examples_as)
    report = run_evaluate(layout, options, load, console, executor)
    if lexists(layout.evaluation):
        draw_heatmaps(layout, report)
        _table(console, best_rows(layout))


def _table(console: Console, rows: list[EvaluationRow]) -> None:
    """Print the best vector of each trait; a row that another tool wrote may lack some measures."""
    columns = [Column("trait"), Column("method")]
    names = ("layer", "AUROC", "d", "95 % interval", "accuracy", "random AUROC", "its p95")
    columns += [Column(name, right=True) for name in names]
    console.line()
    console.table(columns, map(_cells, rows))
    console.line()


def _cells(row: EvaluationRow) -> tuple[str, ...]:
    return (
        row.trait,
        row.method,
        str(row.layer),
        _number(row.val_auroc, ".3f"),
        _number(row.val_effect_size, ".2f"),
        " to ".join(f"{bound:.2f}" for bound in row.val_effect_size_interval or ()) or "-",
        _number(row.val_accuracy, ".2f"),
        _number(row.random_auroc, ".2f"),
        _number(row.random_auroc_p95, ".2f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _compare(console: Console, layout: Layout, traits: tuple[Trait, ...]) -> None:
    """Print the rank correlation of effect size with steering gain, per trait and pooled."""
    from tlcapture.commands.against_steering import against_steering

    found = against_steering(layout, traits or tuple(layout.traits()))
    lines = [(line.trait, line) for line in found.by_trait]
    lines += [("pooled", found.pooled), ("pooled, ranks within trait", found.within)]
    columns = [Column("trait"), Column("layers", right=True), Column("Spearman rho", right=True)]
    console.table(columns, [(name, str(line.n), _number(line.rho, "+.3f")) for name, line in lines])
