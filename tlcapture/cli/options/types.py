"""Types of option values: layers, names, traits, shards, sizes in bytes."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import click

from tlcapture.cli.options import completion
from tlcapture.errors import InputError, TlcaptureError
from tlcapture.names import Trait, split_names
from tlcapture.prompts.template_args import parse_template_arg
from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.text import parse_bytes
from tlcapture.traits.interventions.requested import TraitIntervention
from tlcapture.views.hooks import COMPONENTS, POINTS
from tlcapture.views.kept_tokens import FORMS, KeptTokens


class _Parsed(click.ParamType, ABC):
    """A type that parses text. The help shows its name as it is written, not in capitals."""

    def get_metavar(self, *args: Any, **kwargs: Any) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # click may pass values that are parsed already
            return value
        try:
            return self._parse(value)
        except (InputError, ValueError) as error:
            self.fail(str(error), param, ctx)

    @abstractmethod
    def _parse(self, text: str) -> Any:
        """The value; raises `InputError` or `ValueError` with a message for the user."""


class Text(click.ParamType):
    """A text, which is UTF-8 even where the locale's encoding is another one."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text; as it came if it is not UTF-8."""
        if not any("\udc80" <= character <= "\udcff" for character in value):
            return value
        try:
            return os.fsencode(value).decode("utf-8")
        except UnicodeError:
            return value


class Finite(click.FloatRange):
    """A number within limits; click would accept NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; fails for NaN and infinity."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Count(click.IntRange):
    """A whole number from `min` on, as large as a 32-bit integer can be."""

    name = "n"

    def __init__(self, min: int = 1):
        super().__init__(min)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; fails for one below the minimum, and for one that files cannot hold."""
        number = click.INT.convert(value, param, ctx)
        if number >= 2**31:
            self.fail(f"{number} is not less than {2**31}", param, ctx)
        return super().convert(number, param, ctx)


class LocalPath(click.Path):
    """A path on this machine."""

    def __init__(self, **kinds: bool):
        super().__init__(path_type=Path, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; fails for a URL, and for an empty path, which would be the current folder."""
        from tlcapture.storage.remote.object_stores import is_url

        if not str(value):
            self.fail(f"{value!r} is not a path", param, ctx)
        if is_url(value):
            self.fail(f"{value}: expected a local path: only --root can be a URL", param, ctx)
        return super().convert(value, param, ctx)


class Root(click.Path):
    """An existing folder, or the URL of a remote root, as the folder of its working copy."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)  # a mistyped one would be created

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The folder of a root; fails for one that does not exist or cannot be reached."""
        from tlcapture.storage.remote.object_stores import is_url
        from tlcapture.storage.remote.roots import root_folder

        try:
            folder = root_folder(value)
        except TlcaptureError as error:
            self.fail(str(error), param, ctx)
        if is_url(value) and str(value).lower().startswith("memory:"):
            self.fail(f"{value}: all in it is lost when the command ends: expected a folder or a store", param, ctx)
        return folder if is_url(value) else super().convert(folder, param, ctx)


class LayerOrWord(_Parsed):
    """A layer index, or one of the given words."""

    def __init__(self, *words: str):
        self.words = words
        self.name = "|".join(["N", *words])

    def _parse(self, text: str) -> int | str:
        if text in self.words:
            return text
        if text.isdecimal():
            return int(text)
        raise ValueError(f"{text!r} is neither a layer number nor {' or '.join(map(repr, self.words))}.")


class Tokens(_Parsed):
    """Tokens of the response, as `KeptTokens` reads them."""

    name = FORMS

    def _parse(self, text: str) -> KeptTokens:
        return KeptTokens.parse(text)


class BatchSize(_Parsed):
    """A positive integer, or `auto`, which is read as `None`."""

    name = "N|auto"

    def _parse(self, text: str) -> int | None:
        if text == "auto":
            return None
        if text.isdecimal() and 0 < int(text) < 2**31:
            return int(text)
        raise ValueError(f"{text!r} is neither a number of at least 1 nor 'auto'.")


class TemplateArg(_Parsed):
    """The name of a value for the chat template, and the value: JSON, or else a text."""

    name = "KEY=VALUE"

    def _parse(self, text: str) -> tuple[str, Any]:
        return parse_template_arg(text)


class Intervention(_Parsed):
    """An intervention along a trait's vector, of a class that parses it."""

    def __init__(self, kind: type[TraitIntervention]):
        self.kind = kind
        self.name = kind.form

    def _parse(self, text: str) -> TraitIntervention:
        return self.kind.parse(text)


class Names(_Parsed):
    """Comma-separated names, at least one; repeated names count once."""

    name = "a,b"

    def _parse(self, text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(split_names(text)))
        if not names:
            raise ValueError("contains no name.")
        return names


class PromptSets(Names):
    """Comma-separated names of prompt sets."""

    shell_complete = staticmethod(completion.prompt_sets)


class Traits(_Parsed):
    """Comma-separated traits, or `all`, which is read as an empty tuple."""

    name = "a/b,c/d|all"
    shell_complete = staticmethod(completion.traits)

    def _parse(self, text: str) -> tuple[Trait, ...]:
        if text == "all":
            return ()
        traits = tuple(dict.fromkeys(Trait.parse(name) for name in split_names(text)))
        if not traits:
            raise ValueError("contains no trait.")
        return traits


class OneTrait(_Parsed):
    """One trait."""

    name = "a/b"
    shell_complete = staticmethod(completion.traits)

    def _parse(self, text: str) -> Trait:
        return Trait.parse(text)


class LayerList(_Parsed):
    """Comma-separated layer indices, or `all`, which is read as an empty tuple."""

    name = "N,M|all"

    def _parse(self, text: str) -> tuple[int, ...]:
        if text == "all":
            return ()
        names = split_names(text)
        if not names or not all(name.isdecimal() for name in names):
            raise ValueError(f"{text!r} is not a list of layer numbers, for example 8,12,16.")
        return tuple(sorted({int(name) for name in names}))


class LayersOrNone(LayerList):
    """Comma-separated layer indices, `all`, which is read as an empty tuple, or `none`, which is read as `None`."""

    name = "N,M|all|none"

    def _parse(self, text: str) -> tuple[int, ...] | None:  # type: ignore[override]
        return None if text == "none" else super()._parse(text)


class StreamPoints(_Parsed):
    """Comma-separated residual points and `attn_out`, or `all`."""

    name = "a,b|all"
    points: tuple[str, ...] = (*POINTS, "attn_out")

    def _parse(self, text: str) -> tuple[str, ...]:
        names = self.points if text == "all" else tuple(split_names(text))
        if not names or not set(names) <= set(self.points):
            raise ValueError(f"{text!r} is not a list of residual points: {', '.join(self.points)}.")
        return tuple(point for point in self.points if point in names)


class Points(StreamPoints):
    """Comma-separated residual points, or `all`, which is read as an empty tuple."""

    points = POINTS

    def _parse(self, text: str) -> tuple[str, ...]:
        return () if text == "all" else super()._parse(text)


class ShardOf(_Parsed):
    """`i/n`: shard i of n."""

    name = "i/n"

    def _parse(self, text: str) -> PromptShare:
        return PromptShare.parse(text)


class ByteSize(_Parsed):
    """A number of bytes, with a unit."""

    name = "SIZE"

    def _parse(self, text: str) -> int:
        return parse_bytes(text)


class NumberList(_Parsed):
    """Comma-separated finite numbers other than zero, at least one."""

    name = "X,Y"

    def _parse(self, text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(dict.fromkeys(float(name) for name in split_names(text)))
        except ValueError:
            numbers = ()
        if not numbers or not all(math.isfinite(number) and number for number in numbers):
            raise ValueError(f"{text!r} is not a list of numbers other than zero, for example 0.1,0.2.")
        return numbers


class Views(_Parsed):
    """Comma-separated views of a capture; `internals:L` is the internals of one layer."""

    NAMES = ("residual", "attn_out", "attention", "logit_lens", "internals", "projections")
    name = "a,b"

    def _parse(self, text: str) -> tuple[str, ...]:
        views = tuple(dict.fromkeys(split_names(text)))
        for view in views:
            name, colon, layer = view.partition(":")
            if name not in self.NAMES or (colon and (name != "internals" or not layer.isdecimal())):
                names = ", ".join(self.NAMES)
                raise ValueError(f"{view!r} is not a view: choose from {names} (internals:12 for one layer).")
        if not {"residual", "projections"} & set(views):
            raise ValueError("a capture keeps residual, projections or both: name at least one of them.")
        return views


class Components(click.Choice):
    """One component of the activations, or `all`; read as a tuple of components."""

    def __init__(self) -> None:
        super().__init__([*COMPONENTS, "all"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read a component, or `all`."""
        if isinstance(value, tuple):
            return value
        name = super().convert(value, param, ctx)
        return COMPONENTS if name == "all" else (name,)
