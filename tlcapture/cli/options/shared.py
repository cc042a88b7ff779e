"""Options that several commands share: single ones, and dataclasses of those that belong together (`grouping`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.options import completion
from tlcapture.cli.options.grouping import Decorator, option, shared
from tlcapture.cli.options.types import (
    BatchSize,
    Components,
    Count,
    LayerList,
    LayerOrWord,
    Names,
    Points,
    PromptSets,
    Root,
    ShardOf,
    Tokens,
)
from tlcapture.names import Trait
from tlcapture.views.hooks import POINTS

if TYPE_CHECKING:
    from tlcapture.commands.prompt_files.view_parts import ViewParts
    from tlcapture.storage.experiments.datasets import Datasets
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.choice import VectorChoice
    from tlcapture.views.kept_tokens import KeptTokens

# -- where ----------------------------------------------------------------------------------------


DEFAULT_EXPERIMENT = "default"

root_option = click.option(
    "--root",
    type=Root(),
    metavar="DIR",
    default=Path("."),
    envvar="TLCAPTURE_ROOT",
    show_default="current folder",
    help="Existing folder that holds datasets/ and experiments/, or s3://BUCKET/PREFIX.  [env: TLCAPTURE_ROOT]",
)


@dataclass(frozen=True)
class Location:
    """An experiment's name and the folder that holds `datasets/` and `experiments/`."""

    experiment: str = option(
        "--experiment",
        metavar="NAME",
        default=DEFAULT_EXPERIMENT,
        envvar="TLCAPTURE_EXPERIMENT",
        show_default=True,
        shell_complete=completion.experiments,
        help="Experiment to work in.  [env: TLCAPTURE_EXPERIMENT]",
    )
    root: Path = shared(root_option)

    @property
    def layout(self) -> Layout:
        """Where the experiment's files are."""
        from tlcapture.storage.experiments.layout import Layout

        return Layout(self.root, self.experiment)

    def command(self, name: str, *options: str) -> str:
        """The command line of another command for this experiment, as it can be typed in the current folder."""
        from tlcapture.storage.experiments.command_lines import command_line

        return command_line(self.layout, name, *options)

    @property
    def datasets(self) -> Datasets:
        """Where prompt sets and contrastive examples are."""
        from tlcapture.storage.experiments.datasets import Datasets

        return Datasets(self.root)


# -- prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSetOptions:
    """Which prompt sets to work on; `prompt_set` is `None` if none is named."""

    prompt_set: tuple[str, ...] | None = option(
        "--prompt-set",
        type=PromptSets(),
        help="Prompt sets by name, comma-separated: the files of datasets/inference, or those of the package.",
    )
    all_prompt_sets: bool = option("--all-prompt-sets", is_flag=True, help="All prompt sets.")


shard_option = click.option(
    "--shard",
    type=ShardOf(),
    help="Only every n-th prompt of each set, starting with the i-th, so that n runs share the work.",
)

# -- trait vectors --------------------------------------------------------------------------------


def methods_option(default: str) -> Decorator:
    """The methods of a grid of vectors, with those that are taken by default."""
    return click.option(
        "--methods",
        type=Names(),
        default=default,
        show_default=True,
        help="How vectors are made: probe (weights of a logistic regression), mean_diff (difference of means), "
        "gradient (a direction trained to separate); imported: by another tool.",
    )


components_option = click.option(
    "--component",
    type=Components(),
    default="all",
    show_default=True,
    help="Which activations the vectors are for: the residual stream, or outputs of attention.",
)


def layer_option(default: str) -> Decorator:
    """The layer of the vectors to project onto, with the default that the help shows."""
    return click.option(
        "--layer",
        type=LayerOrWord("auto"),
        help="Layer of the vectors to project onto; auto: for each trait the layer that steering, or else the effect "
        f"size on held-out examples, favours.  [default: {default}]",
    )


@dataclass(frozen=True)
class VectorOptions:
    """Which vector of each trait to project onto; `None` as the layer means the command's default."""

    layer: int | str | None = shared(layer_option("auto"))
    method: str | None = option(
        "--method",
        metavar="METHOD",
        help="How the vectors were made: probe, mean_diff, gradient or imported.  [default: selected as the layer is]",
    )
    vector_experiment: str | None = option(
        "--vector-experiment",
        metavar="NAME",
        shell_complete=completion.experiments,
        help="Use vectors of experiment NAME, even from another model; packaged: those that come with the package.",
    )

    def choice(self, default: str, traits: tuple[Trait, ...] = ()) -> VectorChoice:
        """The choice of vectors, with the rule for layers that applies where no layer is given."""
        from tlcapture.traits.choice import VectorChoice

        layer = default if self.layer is None else self.layer
        return VectorChoice(layer, self.method, self.vector_experiment, traits)


examples_as_option = click.option(
    "--examples-as",
    type=click.Choice(["texts", "scenarios", "auto"]),
    default="auto",
    show_default=True,
    help="What lines of .txt examples are: texts, or scenarios for the model to complete; auto: texts, with a warning.",
)

# -- stored activations ---------------------------------------------------------------------------

format_option = click.option(
    "--format",
    type=click.Choice(["json", "compact"]),
    help="Format of attention, logit lens and projections; compact: safetensors.  [default: json, or compact for "
    "files that would exceed 64 MB as JSON]",
)


@dataclass(frozen=True)
class KeptOptions:
    """Layers and points of the residual stream to keep; empty: all. Tokens to keep in every file; `None`: all.

    And what to keep of attention and logit lens, and the form of their files: see `ViewParts`.
    """

    layers: tuple[int, ...] = option(
        "--layers", type=LayerList(), default="all", show_default=True, help="Layers of the residual stream to keep."
    )
    points: tuple[str, ...] = option(
        "--points",
        type=Points(),
        default="all",
        show_default=True,
        help=f"Points of the residual stream to keep in each layer: {', '.join(POINTS)}.",
    )
    tokens: KeptTokens | None = option(
        "--tokens",
        type=Tokens(),
        help="Keep only these tokens of the response, in every file; A:B is a slice as in Python. Projections and "
        "dynamics are computed over all tokens first.  [default: prompt and response]",
    )
    attention_layers: tuple[int, ...] = option(
        "--attention-layers", type=LayerList(), default="all", show_default=True, help="Layers of --attention to keep."
    )
    lens_layers: tuple[int, ...] = option(
        "--lens-layers", type=LayerList(), default="all", show_default=True, help="Layers of --logit-lens to keep."
    )
    lens_top: int = option(
        "--lens-top",
        type=Count(),
        metavar="K",
        default=50,
        show_default=True,
        help="How many predictions of each layer --logit-lens keeps.",
    )
    format: str | None = shared(format_option)

    @property
    def parts(self) -> ViewParts:
        """What is kept of attention and logit lens."""
        from tlcapture.commands.prompt_files.view_parts import ViewParts

        return ViewParts(self.attention_layers, self.lens_layers, self.lens_top, self.format)


save_dtype_option = click.option(
    "--save-dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of stored activations; auto: a 16-bit dtype that holds every value.",
)

# -- the model ------------------------------------------------------------------------------------

batch_size_option = click.option(
    "--batch-size",
    type=BatchSize(),
    default="auto",
    show_default=True,
    help="Number of prompts that run together; auto: as many as fit in memory. In 16 bits it changes rounding, which "
    "can change tokens.",
)

# The range that JSON and torch's generators can hold.
seed_option = click.option(
    "--seed",
    type=click.IntRange(-(2**63), 2**63 - 1),
    metavar="INTEGER",
    default=0,
    show_default=True,
    help="Seed of all random numbers.",
)
