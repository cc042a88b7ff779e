"""`tlcapture evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING

from tlcapture.cli.command import command
from tlcapture.cli.options.cluster import ClusterOptions
from tlcapture.cli.options.grouping import option, options_of, shared
from tlcapture.cli.options.model import ModelOptions
from tlcapture.cli.options.shared import (
    Location,
    batch_size_option,
    components_option,
    examples_as_option,
    methods_option,
    seed_option,
)
from tlcapture.cli.options.types import LayerList, LocalPath, Traits
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.tables import Column
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.commands.evaluate import EvaluateOptions
    from tlcapture.runs.executors import Executor
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.evaluation_files import CarryOverRow, Evaluation, TraitEvaluation


@dataclass(frozen=True)
class _Settings:
    """The options of `evaluate` alone; no traits or layers: all."""

    traits: tuple[Trait, ...] = option(
        "--traits", type=Traits(), default="all", show_default=True, help="Traits to evaluate."
    )
    methods: tuple[str, ...] = shared(methods_option("probe,mean_diff,gradient,imported"))
    layers: tuple[int, ...] = option(
        "--layers", type=LayerList(), default="all", show_default=True, help="Layers to evaluate at."
    )
    component: tuple[str, ...] = shared(components_option)
    against_steering: bool = option(
        "--against-steering",
        is_flag=True,
        help="Evaluate nothing; correlate the vectors' effect sizes with their gains in steering.",
    )
    examples: Path | None = option(
        "--examples",
        type=LocalPath(),
        metavar="DIR",
        help="Score the selected vectors, or those of --methods and --layers, on a folder with other examples of their "
        "trait.",
    )
    examples_as: str = shared(examples_as_option)
    batch_size: int | None = shared(batch_size_option)
    seed: int = shared(seed_option)


@command(
    "tlcapture evaluate --experiment my_exp",
    "tlcapture evaluate --experiment my_exp --against-steering",
)
@options_of(Location, "location")
@options_of(ModelOptions, "model")
@options_of(ClusterOptions, "cluster")
@options_of(_Settings, "settings")
@working
def evaluate(
    console: Console, location: Location, model: ModelOptions, cluster: ClusterOptions, settings: _Settings
) -> None:
    """Measure how well trait vectors separate held-out examples.

    Prints the best vector of each trait with its AUROC and effect size (Hedges' g), and a verdict: whether words,
    lengths or shuffled labels do as well.
    """
    from tlcapture.traits.vector_files import traits_with_vectors

    layout = location.layout
    layout.check_exists()
    if settings.against_steering:
        _print_against_steering(console, layout, settings.traits)
        console.next = location.command("view")
        return
    traits_with_vectors(layout, settings.traits)
    is_captured = bool(layout.captured_prompt_sets())
    console.next = (
        location.command("project", "--all-prompt-sets")
        if is_captured
        else location.command("capture", "--prompt-set", "single_trait")
    )
    load = model.loader_for(layout, "extraction_model", console)
    load.require()
    from tlcapture.commands.evaluate import EvaluateOptions, draw_heatmaps, run_evaluate
    from tlcapture.traits.evaluation_files import Evaluation

    executor = cluster.make_executor(can_collect=False)
    options = EvaluateOptions(
        settings.traits,
        settings.methods,
        settings.layers,
        settings.component,
        settings.batch_size,
        settings.seed,
        settings.examples_as,
    )
    if settings.examples is not None:
        _carry_over(console, layout, options, settings.examples, load, executor)
        return
    report = run_evaluate(layout, options, load, console, executor)
    if lexists(layout.evaluation):
        draw_heatmaps(layout, report)
        _print_evaluation(console, Evaluation.read(layout.evaluation))


def _carry_over(
    console: Console, layout: Layout, options: EvaluateOptions, folder: Path, load: ModelLoader, executor: Executor
) -> None:
    """Score vectors on the examples in a folder, and print how well they carry over."""
    from tlcapture.commands.carry_over import CarryOverOptions, run_carry_over
    from tlcapture.traits.evaluation_files import Evaluation

    grid = (options.traits, options.named_methods, options.layers, options.components)
    wanted = CarryOverOptions(folder, *grid, options.batch_size, options.examples_as)
    run_carry_over(layout, wanted, load, console, executor)
    names = ("n", "AUROC", "chance p95", "p", "layer 0", "words", "Hedges g", "95 % interval")
    found = Evaluation.read(layout.evaluation).carry_over_to(wanted.name)
    rows = [(trait, row, _vector_name(row)) for trait, scored in found.items() for row in scored]
    cells = [
        (
            trait,
            name,
            f"{row.n_positive} + {row.n_negative}",
            *(_number(each, ".3f") for each in (row.auroc, row.null_auroc_p95, row.p)),
            *(_number(each, ".3f") for each in (row.layer0_auroc, row.bag_of_words_auroc)),
            _number(row.effect_size, ".2f"),
            _interval(row.effect_size_interval),
        )
        for trait, row, name in rows
    ]
    console.line()
    columns = [Column("trait"), Column("vector"), *(Column(name, right=True) for name in names)]
    console.table(columns, cells)
    console.line(f"on the examples of {wanted.name}; chance: their labels shuffled within pairs, or all where unpaired")
    console.line("words: learned from the trait's own examples")
    for trait, row, name in rows:
        if row.is_reversed:
            console.line(f"{trait}: {name} is reversed there: it projects negative examples higher, beyond chance")
    console.line()
    console.next = _steering(layout, [(Trait.parse(trait), row) for trait, row, _ in rows]) or console.next


def _steering(layout: Layout, scored: Sequence[tuple[Trait, CarryOverRow]]) -> str | None:
    """The command that steers with the first vector of a trait that was not steered with, and others like it."""
    from tlcapture.commands.steer import is_steerable
    from tlcapture.storage.experiments.command_lines import command_line

    left = [
        (row.method, row.layer, str(trait))
        for trait, row in scored
        if row.component == "residual" and is_steerable(layout, trait) and not lexists(layout.steering(trait))
    ]
    if not left:
        return None
    method, layer, _ = left[0]
    traits = ",".join(dict.fromkeys(trait for *vector, trait in left if vector == [method, layer]))
    return command_line(layout, "steer", "--traits", traits, "--methods", method, "--layers", str(layer))


def _interval(bounds: Sequence[float | None] | None) -> str:
    return "-" if bounds is None or None in bounds else " to ".join(_number(bound, ".2f") for bound in bounds)


def _vector_name(row: CarryOverRow) -> str:
    return f"{row.method} {row.layer}" + ("" if row.component == "residual" else f" {row.component}")


def _print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print how well each trait's choice does, what it adds over words and lengths, and how traits are told apart."""
    found = evaluation.by_trait
    columns = [Column("trait"), Column("vector")]
    names = ("AUROC", "sd", "Hedges g", "layer 0", "words", "lengths", "p")
    console.line()
    if not found:
        console.line("no vector has an effect size, so that none is selected")
    console.table([*columns, *(Column(name, right=True) for name in names)], map(_cells, found.items()))
    console.line()
    console.line("AUROC, sd, g: nested cross-validation over pairs, which chooses layer and method inside")
    console.line("p: share of 200 labellings, shuffled within pairs, whose best vector separates as well")
    for trait, each in found.items():
        if each.verdict is not None:
            chosen = ", ".join(f"{name} ({count})" for name, count in each.chosen_layers.items())
            console.line(f"{trait}: {each.verdict}; folds chose {chosen}")
    _print_cross_traits(console, evaluation.cross_traits, evaluation.cross_traits_by_chance)
    console.line()


def _cells(pair: tuple[str, TraitEvaluation]) -> tuple[str, ...]:
    trait, found = pair
    others = ("layer 0", "bag of words")
    lengths = [value for name, value in found.baselines.items() if name not in others and value is not None]
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


def _print_cross_traits(
    console: Console, matrix: dict[str, dict[str, float]], by_chance: tuple[float, float] | None
) -> None:
    if len(matrix) < 2:
        return
    names = sorted({*matrix, *(name for row in matrix.values() for name in row)})
    console.line()
    console.line("AUROC of each trait's vector (rows) on each trait's examples (columns, in the same order)")
    columns = [Column("vector"), *(Column(str(number), right=True) for number in range(1, len(names) + 1))]
    rows = [
        (
            f"{names.index(trait) + 1} {trait}",
            *(_number(row.get(name), ".2f") for name in names),
        )
        for trait, row in sorted(matrix.items())
    ]
    console.table(columns, rows)
    if without := [f"{number} {name}" for number, name in enumerate(names, start=1) if name not in matrix]:
        console.line(f"without an evaluated vector: {', '.join(without)}")
    if by_chance is not None:
        low, high = by_chance
        console.line(
            f"on another trait's examples, vectors lie within {low:.2f} to {high:.2f} in 95 % of shuffled labellings, "
            "all cells together"
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_against_steering(console: Console, layout: Layout, traits: tuple[Trait, ...]) -> None:
    """Print the rank correlation of effect size with steering gain, per trait and pooled."""
    from tlcapture.commands.against_steering import FEWEST_LAYERS, against_steering

    found = against_steering(layout, traits or tuple(layout.traits()))
    lines = [(line.trait, line) for line in found.by_trait]
    lines += [("pooled", found.pooled), ("pooled, ranks within trait", found.within)]
    names = ("vectors", "layers", "Spearman rho", "p")
    rows = [
        (name, str(line.n_vectors), str(line.n_layers), _number(line.rho, "+.3f"), _number(line.p, ".3f"))
        for name, line in lines
    ]
    console.table([Column("trait"), *(Column(name, right=True) for name in names)], rows)
    console.line("p: within traits and methods, given how alike neighbouring layers and traits are")
    if any(line.n_layers < FEWEST_LAYERS for _, line in lines):
        needed = f"with fewer than {FEWEST_LAYERS}, chance gives large correlations"
        console.line(f"a correlation needs vectors at {FEWEST_LAYERS} layers that were evaluated and steered; {needed}")
