"""`tlcapture steer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tlcapture.cli.cluster import cluster_options, take_executor
from tlcapture.cli.console import Console
from tlcapture.cli.options import (
    LayerList,
    Names,
    NumberList,
    Traits,
    experiment_option,
    model_options,
    root_option,
    seed_option,
)
from tlcapture.cli.work import working
from tlcapture.names import Trait


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@experiment_option
@click.option("--traits", type=Traits(), default="all", show_default=True, help="Traits to steer with.")
@click.option("--methods", type=Names(), help="Methods whose vectors to use.  [default: the one selected per trait]")
@click.option("--layers", type=LayerList(), default="all", show_default=True, help="Layers to steer at.")
@click.option(
    "--coefficients",
    type=NumberList(),
    default="0.1,0.2,0.3",
    show_default=True,
    help="Strengths, in typical residual norms.",
)
@click.option("--search", is_flag=True, help="Look for each layer's largest coherent coefficient instead of a grid.")
@click.option("--judge", metavar="URL", help="Let a server that speaks OpenAI's chat completions give trait_mean.")
@click.option("--judge-model", default="default", show_default=True, metavar="NAME", help="The judge's model name.")
@model_options
@cluster_options
@seed_option
@root_option
@working
def steer(
    console: Console,
    experiment: str,
    root: Path,
    traits: tuple[Trait, ...],
    methods: tuple[str, ...] | None,
    layers: tuple[int, ...],
    coefficients: tuple[float, ...],
    search: bool,
    judge: str | None,
    judge_model: str,
    seed: int,
    **model: Any,
) -> None:
    """Add trait vectors while the model writes, and score what that does.

    Greedy throughout: nothing is drawn at random, and --seed changes nothing. Runs that results.json
    holds already are not run again.
    """
    from tlcapture.commands.steer import SteerOptions, draw_curves, run_steer
    from tlcapture.extraction.judge import Judge
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.layout import Layout

    asked = None if judge is None else Judge(judge, judge_model)
    layout = Layout(root, experiment)
    executor = take_executor(model, collects=False)
    load = ModelLoader.settle(layout, "extraction_model", console, **model)
    options = SteerOptions(traits, methods or (), layers, coefficients, search, asked)
    report = run_steer(layout, options, load, console, executor)
    draw_curves(layout, traits or tuple(layout.traits()), report)
