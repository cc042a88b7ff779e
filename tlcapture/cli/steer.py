"""`tlcapture steer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.cluster import ClusterOptions
from tlcapture.cli.options.grouping import option, options_of
from tlcapture.cli.options.model import ModelOptions
from tlcapture.cli.options.shared import Location
from tlcapture.cli.options.types import LayerList, Names, NumberList, Traits
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.tables import Column
from tlcapture.cli.work import working
from tlcapture.names import Trait
from tlcapture.text import counted

if TYPE_CHECKING:
    from tlcapture.commands.steer import SteerOptions
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.steering_files import SteeringMonitoring, SteeringResults, SteeringRun


@dataclass(frozen=True)
class _Settings:
    """The options of `steer` alone."""

    traits: tuple[Trait, ...] = option(
        "--traits", type=Traits(), default="all", show_default=True, help="Traits to steer with."
    )
    methods: tuple[str, ...] | None = option(
        "--methods", type=Names(), help="Methods whose vectors to use.  [default: the one selected per trait]"
    )
    layers: tuple[int, ...] = option(
        "--layers", type=LayerList(), default="all", show_default=True, help="Layers to steer at."
    )
    coefficients: tuple[float, ...] = option(
        "--coefficients",
        type=NumberList(),
        default="0.1,0.2,0.3",
        show_default=True,
        help="How far to steer, in multiples of the typical norm of the residual stream.",
    )
    search: bool = option(
        "--search",
        is_flag=True,
        help="Search for the largest coefficient of each layer at which responses are coherent, instead of "
        "--coefficients.",
    )
    judge: str | None = option(
        "--judge",
        metavar="URL",
        help="Have a model score the responses, at the URL of a server with OpenAI's chat completions.  "
        "[default: score by the likelihood of given completions]",
    )
    judge_model: str = option(
        "--judge-model", default="default", show_default=True, metavar="NAME", help="Name of the model of --judge."
    )

    def steer_options(self) -> SteerOptions:
        """What to steer with, at which layers, and who scores the responses."""
        from tlcapture.commands.steer import SteerOptions
        from tlcapture.extraction.judge import Judge

        judge = None if self.judge is None else Judge(self.judge, self.judge_model)
        return SteerOptions(self.traits, self.methods or (), self.layers, self.coefficients, self.search, judge)


@command(
    "tlcapture steer --experiment my_exp --layers 8,12,16",
    "tlcapture steer --experiment my_exp --traits style/formality --coefficients 0.1,0.2,0.3",
)
@options_of(Location, "location")
@options_of(_Settings, "settings")
@options_of(ModelOptions, "model")
@options_of(ClusterOptions, "cluster")
@click.option("--seed", type=int, hidden=True, expose_value=False)  # as other commands have; decoding is greedy
@working
def steer(
    console: Console, location: Location, settings: _Settings, model: ModelOptions, cluster: ClusterOptions
) -> None:
    """Add trait vectors while the model generates, and score the effect.

    For the three settings with the largest gains, 20 random vectors are added for comparison, and the steered responses
    are projected again without steering. Decoding is always greedy. Runs that are already in
    results.json are not repeated.
    """
    from tlcapture.traits.vector_files import traits_with_vectors

    layout = location.layout
    layout.check_exists()
    traits_with_vectors(layout, settings.traits)
    load = model.loader_for(layout, "extraction_model", console)
    load.require()
    from tlcapture.commands.steer import draw_curves, run_steer

    options = settings.steer_options()
    executor = cluster.make_executor(can_collect=False)
    report = run_steer(layout, options, load, console, executor)
    traits = options.traits or tuple(layout.traits())
    draw_curves(layout, traits, report)
    _print(console, layout, traits)
    console.next = location.command("view")


def _print(console: Console, layout: Layout, traits: tuple[Trait, ...]) -> None:
    """Print the largest gains beside those of random vectors, and whether projections follow."""
    from tlcapture.traits.selection import COHERENT, steering_results
    from tlcapture.traits.steering_files import largest_by_chance
    from tlcapture.traits.vector_files import VectorFiles

    found = {trait: steering_results(VectorFiles(layout, trait)) for trait in traits if _has_results(layout, trait)}
    names = ("gain", "se", "random p95", "coherence", "follows", "random p95", "p")
    rows, notes = [], []
    for trait, results in found.items():
        runs = [run for run in results.single_layer_runs if run.null]
        rows += [_cells(trait, results, run) for run in sorted(runs, key=lambda run: -run.delta)]
        chance = largest_by_chance(results.single_layer_runs)
        best = max((run.delta for run in runs if run.coherence_mean >= COHERENT), default=None)
        if chance is not None:
            beats = "beats" if best is None or best > chance else "does not beat"
            says = "no coherent run" if best is None else f"best gain {best:+.1f}"
            n_cells = len(results.single_layer_runs)
            cells = f"the best of {counted(n_cells, 'cell')}, by random vectors at {len(runs)} of them"
            notes.append(f"{trait}: {says} {beats} {chance:+.1f}, what chance reaches at {cells}")
    if not rows:
        return
    console.line()
    columns = [Column("trait"), Column("vector"), Column("x", right=True)]
    console.table([*columns, *(Column(name, right=True) for name in names)], rows)
    console.line()
    console.line("gain: points of trait_mean over the unsteered model; se: its standard error over questions")
    console.line("follows: rank correlation of a response's projection, read without steering, with the coefficient")
    console.line("p: of other directions read from the same responses; vectors without a meaning may follow as clearly")
    for note in notes:
        console.line(note)
    console.line()


def _has_results(layout: Layout, trait: Trait) -> bool:
    return layout.steering(trait).is_file()


def _cells(trait: Trait, results: SteeringResults, run: SteeringRun) -> tuple[str, ...]:
    monitored = next((each for each in results.monitoring if _is_of(each, run)), None)
    rho = None if monitored is None else monitored.rank_correlation
    return (
        str(trait),
        f"{run.method} {run.layer}",
        f"{run.coefficient:g}",
        f"{run.delta:+.1f}",
        "-" if run.standard_error is None else f"{run.standard_error:.1f}",
        "-" if run.null_p95 is None else f"{run.null_p95:+.1f}",
        f"{run.coherence_mean:.0f}",
        "-" if rho is None else f"{rho:+.2f}",
        "-" if monitored is None or monitored.null_p95 is None else f"{monitored.null_p95:+.2f}",
        "-" if monitored is None or monitored.p is None else f"{monitored.p:.2f}",
    )


def _is_of(monitored: SteeringMonitoring, run: SteeringRun) -> bool:
    key = (monitored.component, monitored.method, monitored.layer)
    return key == (run.component, run.method, run.layer)
