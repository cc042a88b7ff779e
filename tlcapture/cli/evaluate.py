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
    from tlcapture.traits.evaluation_files import Evaluation, TraitEvaluation


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
    layout = location.layout
    if against_steering:
        _compare(console, layout, grid.traits)
        return
    from tlcapture.commands.evaluate import EvaluateOptions, best_vectors, draw_heatmaps, run_evaluate

    executor = cluster.make_executor(can_collect=False)
    load = model.loader_for(layout, "extraction_model", console)
    options = EvaluateOptions(grid.traits, grid.methods, grid.layers, grid.component, batch_size, seed, examples_as)
    report = run_evaluate(layout, options, load, console, executor)
    if lexists(layout.evaluation):
        draw_heatmaps(layout, report)
        _print(console, best_vectors(layout))


def _print(console: Console, evaluation: Evaluation) -> None:
    """Print how well each trait's choice does, what it adds over words and lengths, and how traits are told apart."""
    found = evaluation.by_trait
    columns = [Column("trait"), Column("vector")]
    names = ("AUROC", "sd", "Hedges g", "layer 0", "words", "lengths", "p")
    console.line()
    console.table([*columns, *(Column(name, right=True) for name in names)], map(_cells, found.items()))
    console.line()
    console.line("AUROC, sd, g: nested cross-validation over pairs, which chooses layer and method inside")
    console.line("p: share of 200 labellings, shuffled within pairs, whose best vector separates as well")
    for trait, each in found.items():
        if each.verdict is not None:
            chosen = ", ".join(f"{name} ({count})" for name, count in each.chosen_layers.items())
            console.line(f"{trait}: {each.verdict}; folds chose {chosen}")
    _print_cross_traits(console, evaluation.cross_traits)
    console.line()


def _cells(pair: tuple[str, TraitEvaluation]) -> tuple[str, ...]:
    trait, found = pair
    lengths = [value for name, value in found.baselines.items() if name not in ("layer 0", "bag of words")]
    return (
        trait,
        f"{found.method} {found.layer}",
        _number(found.nested_auroc, ".3f"),
        _number(found.nested_sd, ".3f"),
        _number(found.nested_effect_size, ".2f"),
        _number(found.baselines.get("layer 0"), ".3f"),
        _number(found.baselines.get("bag of words"), ".3f"),
        _number(max(lengths, default=None), ".3f"),
        _number(found.p, ".3f"),
    )


def _print_cross_traits(console: Console, matrix: dict[str, dict[str, float]]) -> None:
    if len(matrix) < 2:
        return
    names = sorted({*matrix, *(name for row in matrix.values() for name in row)})
    console.line()
    console.line("AUROC of each trait's vector (rows) on each trait's examples (columns, in the same order)")
    columns = [Column("vector"), *(Column(str(number), right=True) for number in range(1, len(names) + 1))]
    rows = [
        (
            f"{names.index(trait) + 1 if trait in names else '-'} {trait}",
            *(_number(row.get(name), ".2f") for name in names),
        )
        for trait, row in sorted(matrix.items())
    ]
    console.table(columns, rows)


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
