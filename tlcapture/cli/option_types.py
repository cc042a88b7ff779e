"""Types of option values: layers, names, traits, shards, sizes in bytes."""

from __future__ import annotations

import math
from typing import Any

import click

from tlcapture.errors import InputError
from tlcapture.names import Trait, split_names
from tlcapture.runs.shards import Shard
from tlcapture.text import parse_bytes
from tlcapture.views.hooks import COMPONENTS, POINTS


class _Named(click.ParamType):
    """A type whose name the help shows as it is written, not in capitals."""

    def get_metavar(self, *args: Any, **kwargs: Any) -> str:
        return self.name


class LayerOrWord(_Named):
    """A layer number, or one of the given words."""

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
            self.fail("contains no name.", param, ctx)
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
            self.fail("contains no trait.", param, ctx)
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
            self.fail(f"{value!r} is not a list of layer numbers, for example 8,12,16.", param, ctx)
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
            self.fail(f"{value!r} is not a list of residual points: {', '.join(POINTS)}.", param, ctx)
        return tuple(point for point in POINTS if point in names)


class ShardOf(_Named):
    """`i/n`: shard i of n."""

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
            self.fail(f"{value!r} is not a list of numbers other than zero, for example 0.1,0.2.", param, ctx)
        return numbers


class Components(click.Choice):
    """One component of the activations, or `all`; read as a tuple of components."""

    def __init__(self) -> None:
        super().__init__([*COMPONENTS, "all"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        name = super().convert(value, param, ctx)
        return COMPONENTS if name == "all" else (name,)


class Views(click.ParamType):
    """Comma-separated views of a capture; `internals:L` is the internals of one layer."""

    NAMES = ("residual", "attn_out", "attention", "logit_lens", "internals", "projections")
    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        views = tuple(dict.fromkeys(split_names(value)))
        for view in views:
            name, colon, layer = view.partition(":")
            if name not in self.NAMES or (colon and (name != "internals" or not layer.isdecimal())):
                names = ", ".join(self.NAMES)
                self.fail(f"{view!r} is not a view: choose from {names} (internals:12 for one layer).", param, ctx)
        if not {"residual", "projections"} & set(views):
            self.fail("a capture keeps residual, projections or both: name at least one of them.", param, ctx)
        return views
