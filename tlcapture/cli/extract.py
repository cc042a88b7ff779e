"""`tlcapture extract`."""

from __future__ import annotations

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.cluster import ClusterOptions, cluster_options
from tlcapture.cli.options.model import ModelOptions, model_options
from tlcapture.cli.options.shared import (
    GridOptions,
    Location,
    batch_size_option,
    examples_as_option,
    grid_options,
    location_options,
    seed_option,
)
from tlcapture.cli.output.console import Console
from tlcapture.cli.work import working


@command(
    "tlcapture extract --experiment my_exp",
    "tlcapture extract --experiment my_exp --traits behavioral/refusal --methods mean_diff --layers 8,12,16",
)
@location_options
@grid_options("extract", default_traits="the root's own, or the packaged ones where it has none")
@click.option(
    "--position",
    type=click.Choice(["auto", "response_mean", "last_prompt_token", "all_mean"]),
    default="auto",
    show_default=True,
    help="Which activations to read; auto: the mean over the response, or over the whole text if there is no response.",
)
@examples_as_option
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Skip traits whose vectors exist already, made from the same examples and a model of the same name.",
)
@model_options
@cluster_options
@batch_size_option
@seed_option
@working
def extract(
    console: Console,
    location: Location,
    grid: GridOptions,
    position: str,
    examples_as: str,
    skip_existing: bool,
    batch_size: int | None,
    seed: int,
    model: ModelOptions,
    cluster: ClusterOptions,
) -> None:
    """Extract trait vectors from the contrastive examples in datasets/traits.

    A trait's vector is a direction that separates the activations of its positive examples from those of its negative
    ones. Some examples are held out, for "tlcapture evaluate".
    """
    layout = location.layout
    for trait in grid.traits or ():
        location.datasets.trait_folder(trait)
    load = model.loader_for(layout, "extraction_model", console)
    load.require()
    from tlcapture.commands.extract import ExtractOptions, run_extract

    executor = cluster.make_executor(can_collect=False)
    options = ExtractOptions(
        traits=grid.traits,
        methods=grid.methods,
        layers=grid.layers,
        components=grid.component,
        position=position,
        examples_as=examples_as,
        batch_size=batch_size,
        seed=seed,
        skip_existing=skip_existing,
    )
    run_extract(layout, options, load, console, executor)
    console.next = location.command("evaluate")
