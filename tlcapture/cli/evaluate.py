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
    grid_options,
    location_options,
    model_options,
    seed_option,
)
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.storage.layout import Layout
    from tlcapture.traits.evaluation_files import EvaluationRow


@click.command(context_settings=HELP_NAMES)
@location_options
@grid_options("evaluate")
@click.option(
    "--against-steering",
    is_flag=True,
    help="Evaluate nothing; compare effect sizes with steering results, layer by layer.",
)
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
    batch_size: int | None,
    seed: int,
    model: ModelOptions,
    cluster: ClusterOptions,
) -> None:
    """Measure how well trait vectors separate held-out examples."""
    layout = location.layout
    if against_steering:
        _compare(console, layout, grid.traits)
        return
    from tlcapture.commands.evaluate import EvaluateOptions, best_rows, draw_heatmaps, run_evaluate

    executor = cluster.make_executor(can_collect=False)
    load = model.loader_for(layout, "extraction_model", console)
    options = EvaluateOptions(grid.traits, grid.methods, grid.layers, grid.component, batch_size, seed)
    report = run_evaluate(layout, options, load, console, executor)
    if lexists(layout.evaluation):
        draw_heatmaps(layout, report)
        _table(console, best_rows(layout))


def _table(console: Console, rows: list[EvaluationRow]) -> None:
    """Print the best vector of each trait; a row of another tool may lack some measures."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    console.line()
    console.line(
        f"{'trait':<26}{'method':<11}{'layer':>5}{'AUROC':>8}{'d':>8}{'95 % interval':>17}"
        f"{'accuracy':>10}{'random AUROC':>15}"
    )
    for row in rows:
        interval = " to ".join(f"{bound:.2f}" for bound in row.val_effect_size_interval or ()) or "-"
        random = f"{number(row.random_auroc, '.2f')} (p95 {number(row.random_auroc_p95, '.2f')})"
        console.line(
            f"{row.trait:<26}{row.method:<11}{row.layer:>5}{number(row.val_auroc, '.3f'):>8}"
            f"{number(row.val_effect_size, '.2f'):>8}{interval:>17}{number(row.val_accuracy, '.2f'):>10}{random:>18}"
        )
    console.line()


def _compare(console: Console, layout: Layout, traits: tuple[Trait, ...]) -> None:
    """Print the rank correlation of effect size with the steering gain, per trait and pooled."""
    from tlcapture.commands.against_steering import against_steering

    comparison = against_steering(layout, traits or tuple(layout.traits()))
    console.line(f"{'trait':<26}{'layers':>7}{'Spearman rho':>14}")
    for line in comparison.by_trait:
        rho = "-" if line.rho is None else f"{line.rho:+.3f}"
        console.line(f"{line.trait:<26}{line.n:>7}{rho:>14}")
    for name, line in (("pooled", comparison.pooled), ("pooled, ranks within trait", comparison.within)):
        rho = "-" if line.rho is None else f"{line.rho:+.3f}"
        console.line(f"{name:<26}{line.n:>7}{rho:>14}")
