"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tlcapture.errors import InputError
from tlcapture.names import Trait, split_names
from tlcapture.runs.shards import Shard
from tlcapture.text import parse_bytes
from tlcapture.views.hooks import COMPONENTS, POINTS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Named(click.ParamType):
    """A type whose name is shown in the help as it is written, not in capitals."""

    def get_metavar(self, *args: Any, **kwargs: Any) -> str:
        return self.name


class LayerOrWord(_Named):
    """A layer number, or one of some words."""

    def __init__(self, *words: str):
        self.words = words
        self.name = "|".join(["N", *words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or value in self.words:
            return value
        if str(value).isdecimal():
            return int(value)
        self.fail(f"{value!r} is neither a layer number nor {' or '.join(map(repr, self.words))}.", param, ctx)


class BatchSize(_Named):
    """A number of at least 1, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        if str(value).isdecimal() and 0 < int(value) < 2**31:
            return int(value)
        self.fail(f"{value!r} is neither a number of at least 1 nor 'auto'.", param, ctx)


class Names(_Named):
    """Comma-separated names, at least one."""

    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(split_names(value)))
        if not names:
            self.fail("names nothing.", param, ctx)
        return names


class Traits(_Named):
    """Comma-separated traits, or `all`."""

    name = "a/b,c/d|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Trait, ...]:
        if isinstance(value, tuple):
            return value
        if value == "all":
            return ()
        try:
            traits = tuple(dict.fromkeys(Trait.parse(name) for name in split_names(value)))
        except InputError as error:
            self.fail(str(error), param, ctx)
        if not traits:
            self.fail("names no trait.", param, ctx)
        return traits


class LayerList(_Named):
    """Comma-separated layer numbers, or `all`."""

    name = "N,M|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if value == "all":
            return ()
        names = split_names(value)
        if not names or not all(name.isdecimal() for name in names):
            self.fail(f"{value!r} is no list of layer numbers, for example 8,12,16.", param, ctx)
        return tuple(sorted({int(name) for name in names}))


class Points(_Named):
    """Comma-separated residual points, or `all`."""

    name = "a,b|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        if value == "all":
            return ()
        names = split_names(value)
        if not names or not set(names) <= set(POINTS):
            self.fail(f"{value!r} is no list of residual points: {', '.join(POINTS)}.", param, ctx)
        return tuple(point for point in POINTS if point in names)


class ShardOf(_Named):
    """`i/n`: share i of n."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shard:
        if isinstance(value, Shard):
            return value
        try:
            return Shard.parse(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


class ByteSize(_Named):
    """A number of bytes, with a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


class NumberList(_Named):
    """Comma-separated numbers other than zero, at least one."""

    name = "X,Y"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(dict.fromkeys(float(name) for name in split_names(value)))
        except ValueError:
            numbers = ()
        if not numbers or not all(math.isfinite(number) and number for number in numbers):
            self.fail(f"{value!r} is no list of numbers other than zero, for example 0.1,0.2.", param, ctx)
        return numbers


class Components(click.Choice):
    """Which activation vectors are for: one component, or `all`; a tuple of components."""

    def __init__(self) -> None:
        super().__init__([*COMPONENTS, "all"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        name = super().convert(value, param, ctx)
        return COMPONENTS if name == "all" else (name,)


def together(*decorators: Decorator) -> Decorator:
    """Several option decorators as one, in the order of the help text."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


experiment_option = click.option("--experiment", required=True, metavar="NAME", help="Experiment folder to work in.")

root_option = click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    envvar="TLCAPTURE_ROOT",
    show_default="current folder",
    help="Folder that holds datasets/ and experiments/.  [env: TLCAPTURE_ROOT]",
)


def grid_options(doing: str) -> Decorator:
    """Which vectors to do something with, for example to `extract` them."""
    return together(
        click.option("--traits", type=Traits(), default="all", show_default=True, help=f"Traits to {doing}."),
        click.option(
            "--methods",
            type=Names(),
            default="probe,mean_diff,gradient",
            show_default=True,
            help="How directions are found.",
        ),
        click.option("--layers", type=LayerList(), default="all", show_default=True, help=f"Layers to {doing} at."),
        click.option(
            "--component",
            type=Components(),
            default="all",
            show_default=True,
            help="Which activation the vectors are for.",
        ),
    )


prompt_set_options = together(
    click.option("--prompt-set", type=Names(), help="Prompt sets, comma-separated."),
    click.option("--all-prompt-sets", is_flag=True, help="All prompt sets."),
)

vector_options = together(
    click.option("--method", metavar="METHOD", help="probe, mean_diff or gradient.  [default: the one selected]"),
    click.option(
        "--vector-experiment",
        metavar="NAME",
        help="Experiment whose vectors to use; says that another model's are meant.",
    ),
)

kept_options = together(
    click.option(
        "--layers", type=LayerList(), default="all", show_default=True, help="Layers of the residual stream to keep."
    ),
    click.option(
        "--points",
        type=Points(),
        default="all",
        show_default=True,
        help=f"Residual points to keep of each layer: {', '.join(POINTS)}.",
    ),
)

save_dtype_option = click.option(
    "--save-dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of stored activations; auto: 16 bits that hold every value.",
)

shard_option = click.option(
    "--shard", type=ShardOf(), help="Only every n-th prompt of each set, from the i-th on: the share of one run of n."
)

batch_size_option = click.option(
    "--batch-size", type=BatchSize(), default="auto", show_default=True, help="Prompts that run together."
)

# What JSON, and torch's generators, can hold.
seed_option = click.option(
    "--seed",
    type=click.IntRange(-(2**63), 2**63 - 1),
    metavar="INTEGER",
    default=0,
    show_default=True,
    help="Seed of everything random.",
)

engine_options = together(
    click.option(
        "--engine",
        type=click.Choice(["auto", "hooked", "bridge"]),
        default="auto",
        show_default=True,
        help="hooked: HookedTransformer; bridge: TransformerBridge; auto: hooked where it covers the model.",
    ),
    click.option("--device", default="auto", show_default=True, help="cuda, mps, cpu; auto: the first there is."),
    click.option(
        "--n-devices",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="CUDA devices over which the model is spread, where it is too large for one.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Compute dtype; auto: the checkpoint's own, float32 on a CPU.",
    ),
)

model_options = together(
    click.option(
        "--model",
        metavar="NAME",
        help="smollm2 (embedded), a folder of Hugging Face weights, or a hub name.  "
        "[default: the experiment's, or smollm2]",
    ),
    click.option(
        "--allow-model-change", is_flag=True, help="Go on although the experiment has used another model so far."
    ),
    engine_options,
)
