"""`tlcapture extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@experiment_option
@grid_options("extract")
@click.option(
    "--position",
    type=click.Choice(["auto", "response_mean", "last_prompt_token", "all_mean"]),
    default="auto",
    show_default=True,
    help="What is read out; auto: the mean of the response, or of a bare text.",
)
@model_options
@cluster_options
@batch_size_option
@seed_option
@root_option
@working
def extract(
    console: Console,
    experiment: str,
    root: Path,
    traits: tuple[Trait, ...],
    methods: tuple[str, ...],
    layers: tuple[int, ...],
    component: tuple[str, ...],
    position: str,
    batch_size: int | None,
    seed: int,
    **model: Any,
) -> None:
    """Extract trait vectors from the contrastive examples in datasets/traits."""
    from tlcapture.commands.extract import ExtractOptions, run_extract
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.layout import Layout

    layout = Layout(root, experiment)
    executor = take_executor(model, collects=False)
    load = ModelLoader.settle(layout, "extraction_model", console, **model)
    options = ExtractOptions(
        traits=traits,
        methods=methods,
        layers=layers,
        components=component,
        position=position,
        batch_size=batch_size,
        seed=seed,
    )
    run_extract(layout, options, load, console, executor)
