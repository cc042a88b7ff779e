"""`tlcapture steer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from tlcapture.cli.cluster import ClusterOptions, cluster_options
from tlcapture.cli.console import Console
from tlcapture.cli.grouping import collected
from tlcapture.cli.option_types import LayerList, Names, NumberList, Traits
from tlcapture.cli.options import HELP_NAMES, Location, ModelOptions, location_options, model_options, seed_option
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.commands.steer import SteerOptions


@dataclass(frozen=True)
class _Settings:
    """The options of `steer` alone; the seed is only recorded, because steering is greedy."""

    traits: tuple[Trait, ...]
    methods: tuple[str, ...] | None
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    search: bool
    judge: str | None
    judge_model: str
    seed: int

    def steer_options(self) -> SteerOptions:
        """What to steer with, at which layers, and who scores the responses."""
        from tlcapture.commands.steer import SteerOptions
        from tlcapture.extraction.judge import Judge

        judge = None if self.judge is None else Judge(self.judge, self.judge_model)
        return SteerOptions(self.traits, self.methods or (), self.layers, self.coefficients, self.search, judge)


@click.command(context_settings=HELP_NAMES)
@location_options
@click.option("--traits", type=Traits(), default="all", show_default=True, help="Traits to steer with.")
@click.option("--methods", type=Names(), help="Methods whose vectors to use.  [default: the one selected per trait]")
@click.option("--layers", type=LayerList(), default="all", show_default=True, help="Layers to steer at.")
@click.option(
    "--coefficients",
    type=NumberList(),
    default="0.1,0.2,0.3",
    show_default=True,
    help="Strengths, in units of the typical residual norm.",
)
@click.option("--search", is_flag=True, help="Search for each layer's largest coherent coefficient, instead of a grid.")
@click.option("--judge", metavar="URL", help="Score trait_mean with a server that offers OpenAI's chat completions.")
@click.option("--judge-model", default="default", show_default=True, metavar="NAME", help="The judge's model name.")
@model_options
@cluster_options
@seed_option
@collected(_Settings, "settings")
@working
def steer(
    console: Console, location: Location, settings: _Settings, model: ModelOptions, cluster: ClusterOptions
) -> None:
    """Add trait vectors while the model generates, and score the effect.

    Decoding is always greedy, so --seed has no effect. Runs that are already in results.json are not repeated.
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
    draw_curves(layout, options.traits or tuple(layout.traits()), report)
