"""`tlcapture evaluate`."""

from __future__ import annotations

from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.cluster import cluster_options, take_executor
from tlcapture.cli.console import Console
from tlcapture.cli.options import (
    batch_size_option,
    experiment_option,
    grid_options,
    model_options,
    root_option,
    seed_option,
)
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.traits.evaluation_files import EvaluationRow


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@experiment_option
@grid_options("evaluate")
@click.option(
    "--against-steering",
    is_flag=True,
    help="Evaluate nothing: compare effect sizes with steering results, layer by layer.",
)
@model_options
@cluster_options
@batch_size_option
@seed_option
@root_option
@working
def evaluate(
    console: Console,
    experiment: str,
    root: Path,
    traits: tuple[Trait, ...],
    methods: tuple[str, ...],
    layers: tuple[int, ...],
    component: tuple[str, ...],
    against_steering: bool,
    batch_size: int | None,
    seed: int,
    **model: Any,
) -> None:
    """Measure how well trait vectors separate the examples that were held out."""
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.layout import Layout

    layout = Layout(root, experiment)
    if against_steering:
        _compare(console, layout, traits)
        return
    from tlcapture.commands.evaluate import EvaluateOptions, best_rows, draw_heatmaps, run_evaluate

    executor = take_executor(model, collects=False)
    load = ModelLoader.settle(layout, "extraction_model", console, **model)
    options = EvaluateOptions(traits, methods, layers, component, batch_size, seed)
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


def _compare(console: Console, layout: Any, traits: tuple[Trait, ...]) -> None:
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
