"""`tlcapture extract`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

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
from tlcapture.cli.options.types import LayerList, Traits
from tlcapture.cli.output.console import Console
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.commands.extract import ExtractOptions


@dataclass(frozen=True)
class _Settings:
    """The options of `extract` alone; `traits` is `None` where none is named."""

    traits: tuple[Trait, ...] | None = option(
        "--traits",
        type=Traits(),
        show_default="the root's own, or the packaged ones where it has none",
        help="Traits to extract.",
    )
    methods: tuple[str, ...] = shared(methods_option("probe,mean_diff,gradient"))
    layers: tuple[int, ...] = option(
        "--layers", type=LayerList(), default="all", show_default=True, help="Layers to extract at."
    )
    component: tuple[str, ...] = shared(components_option)
    position: str = option(
        "--position",
        type=click.Choice(["auto", "response_mean", "last_prompt_token", "all_mean"]),
        default="auto",
        show_default=True,
        help="Which activations to read; auto: the mean over the response, or over the whole text if there is no "
        "response.",
    )
    examples_as: str = shared(examples_as_option)
    skip_existing: bool = option(
        "--skip-existing",
        is_flag=True,
        help="Skip traits whose vectors exist already, made from the same examples and a model of the same name.",
    )
    batch_size: int | None = shared(batch_size_option)
    seed: int = shared(seed_option)

    def extract_options(self) -> ExtractOptions:
        """What to extract, and from which examples."""
        from tlcapture.commands.extract import ExtractOptions

        return ExtractOptions(
            traits=self.traits,
            methods=self.methods,
            layers=self.layers,
            components=self.component,
            position=self.position,
            examples_as=self.examples_as,
            batch_size=self.batch_size,
            seed=self.seed,
            skip_existing=self.skip_existing,
        )


@command(
    "tlcapture extract --experiment my_exp",
    "tlcapture extract --experiment my_exp --traits behavioral/refusal --methods mean_diff --layers 8,12,16",
)
@options_of(Location, "location")
@options_of(ModelOptions, "model")
@options_of(ClusterOptions, "cluster")
@options_of(_Settings, "settings")
@working
def extract(
    console: Console, location: Location, model: ModelOptions, cluster: ClusterOptions, settings: _Settings
) -> None:
    """Extract trait vectors from the contrastive examples in datasets/traits.

    A trait's vector is a direction that separates the activations of its positive examples from those of its negative
    ones. Some examples are held out, for "tlcapture evaluate".
    """
    layout = location.layout
    for trait in settings.traits or ():
        location.datasets.trait_folder(trait)
    load = model.loader_for(layout, "extraction_model", console)
    load.require()
    from tlcapture.commands.extract import run_extract

    executor = cluster.make_executor(can_collect=False)
    run_extract(layout, settings.extract_options(), load, console, executor)
    console.next = location.command("evaluate")
