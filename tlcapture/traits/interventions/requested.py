"""Interventions along trait vectors, as the user asks for them. Loads no torch.

    Steer("behavioral/refusal", +0.2, layers=16)
    Steer.parse("behavioral/refusal:+0.2@16"), Ablate.parse("tone/loud@all"), Cap.parse("tone/loud:1.5@8-11:response")

Each names a vector, layers, and where it acts. They become changes to activations in `resolved_interventions`.
"""

from __future__ import annotations

import math
import re
from abc import ABC
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, SupportsIndex, TypeVar

from tlcapture.errors import InputError
from tlcapture.generation.interventions.where import EVERYWHERE, FORMS, FROM_LAST_PROMPT_TOKEN, Where
from tlcapture.names import Trait
from tlcapture.text import as_ranges

AUTO, ALL = "auto", "all"
LAYER_FORMS = "layers such as 16 or 0,2,5-8, all, or auto (the selected one)"
_PARTS = re.compile(
    r"(?P<trait>[^:@\s]+)(?::(?P<number>[^:@\s]+))?@(?P<layers>[^:@\s]+)(?::(?P<where>[^:@\s]+))?", re.ASCII
)
_LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")

Layers = tuple[int, ...] | str  # layers in order, or `auto` or `all`
Given = TypeVar("Given", bound="TraitIntervention")


def parse_layers(text: str) -> Layers:
    """Read `0,2,5-8`, `all` or `auto`; raises `InputError` for anything else."""
    if text in (AUTO, ALL):
        return text
    found: set[int] = set()
    for part in text.split(","):
        match = _LAYERS.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"{text!r}: expected {LAYER_FORMS}")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def layers_text(layers: Layers) -> str:
    """Layers as `parse_layers` reads them."""
    return layers if isinstance(layers, str) else as_ranges(layers).replace(" to ", "-").replace(" ", "")


def _checked_layers(name: str, layers: SupportsIndex | Iterable[SupportsIndex] | str) -> Layers:
    """Layers as the user gives them in Python, to the intervention `name`; raises `InputError` for invalid ones."""
    if isinstance(layers, str):
        return parse_layers(layers)
    several = list(layers) if isinstance(layers, Iterable) else [layers]
    if all(isinstance(layer, SupportsIndex) for layer in several):
        chosen = tuple(sorted({index(layer) for layer in several}))
        if chosen and chosen[0] >= 0:
            return chosen
    raise InputError(f"{name}: layers {layers!r}: expected {LAYER_FORMS}")


def _as_float(number: Any) -> float:
    """A number of Python, NumPy or torch as a float; NaN for anything else."""
    try:
        return float(number)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


@dataclass(frozen=True, eq=False, repr=False)
class TraitIntervention(ABC):
    """The base of the three interventions.

    Attributes:
        vector: a trait, `category/name`, or in Python a vector `[d_model]` for all layers.
        layers: a layer, several, `"0,2,5-8"`, `"all"` or `"auto"`, the selected one of the trait.
        where: `prompt`, `response`, `thinking`, `first=N`, `everywhere` or `from_last_prompt_token`; without it, the
            default of the intervention.
    """

    kind: ClassVar[str]
    form: ClassVar[str]
    example: ClassVar[str]
    number_name: ClassVar[str | None] = None
    default_where: ClassVar[Where] = EVERYWHERE

    vector: Any
    number: float | None
    layers: Layers
    where: Where

    def _settle(
        self, vector: Any, number: Any, layers: SupportsIndex | Iterable[SupportsIndex] | str, where: str | None
    ) -> None:
        """Check and set the attributes; raises `InputError` for invalid values."""
        name = type(self).__name__
        if isinstance(vector, str):
            vector = Trait.parse(vector)
        elif not isinstance(vector, Trait) and getattr(vector, "ndim", None) != 1:
            raise InputError(f"{name}: expected a trait such as 'behavioral/refusal' or a vector [d_model]")
        value = None if self.number_name is None else _as_float(number)
        if value is not None and not math.isfinite(value):
            raise InputError(f"{name}: {self.number_name} {number!r}: expected a finite number")
        chosen = _checked_layers(name, layers)
        if chosen == AUTO and not isinstance(vector, Trait):
            raise InputError(f"{name}: a vector of your own has no selected layer: pass layers=16 or layers='all'")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "number", value)
        object.__setattr__(self, "layers", chosen)
        object.__setattr__(self, "where", self.default_where if where is None else Where.parse(where))

    @classmethod
    def parse(cls: type[Given], text: str) -> Given:
        """Read the form of the command line; raises `InputError`, which names it, for anything else.

        Example:
            Steer.parse("behavioral/refusal:+0.2@12")
        """
        match = _PARTS.fullmatch(text)
        needs_number = cls.number_name is not None
        if match is None or (match["number"] is not None) != needs_number:
            raise InputError(f"{text!r} is not {cls.form}, for example {cls.example}")
        try:
            numbers = [float(match["number"])] if needs_number else []
        except ValueError:
            raise InputError(f"{text!r}: {match['number']!r} is not a number: expected {cls.form}") from None
        make: Callable[..., Given] = cls
        try:
            return make(match["trait"], *numbers, match["layers"], match["where"])
        except InputError as error:
            raise InputError(f"{text!r}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TraitIntervention) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        """A key that equal interventions share; the user's own vectors are compared by identity."""
        vector = self.vector if isinstance(self.vector, Trait) else id(self.vector)
        return type(self), vector, self.number, self.layers, self.where

    def __repr__(self) -> str:
        vector = repr(str(self.vector)) if isinstance(self.vector, Trait) else f"<vector of {len(self.vector)}>"
        layers = repr(layers_text(self.layers))
        number = "" if self.number is None else f", {self.number:+g}" if self.kind == "steer" else f", {self.number:g}"
        where = "" if self.where == self.default_where else f", where={str(self.where)!r}"
        return f"{type(self).__name__}({vector}{number}, layers={layers}{where})"


class Steer(TraitIntervention):
    """Adds `coefficient` typical residual norms along a vector; from the last prompt token on, unless `where` says.

    Example:
        Steer("behavioral/refusal", +0.2, layers=12)
    """

    kind = "steer"
    form = "TRAIT:COEFFICIENT@LAYERS[:WHERE]"
    example = f"behavioral/refusal:+0.2@16, with {LAYER_FORMS}, and where: {FORMS}"
    number_name = "coefficient"
    default_where = FROM_LAST_PROMPT_TOKEN

    def __init__(
        self,
        vector: Any,
        coefficient: float,
        layers: SupportsIndex | Iterable[SupportsIndex] | str = AUTO,
        where: str | None = None,
    ):
        self._settle(vector, coefficient, layers, where)


class Ablate(TraitIntervention):
    """Removes the component along a vector; at all tokens, unless `where` says.

    Example:
        Ablate("behavioral/refusal", layers="all")
    """

    kind = "ablate"
    form = "TRAIT@LAYERS[:WHERE]"
    example = f"behavioral/refusal@all, with {LAYER_FORMS}, and where: {FORMS}"

    def __init__(
        self, vector: Any, layers: SupportsIndex | Iterable[SupportsIndex] | str = AUTO, where: str | None = None
    ):
        self._settle(vector, None, layers, where)


class Cap(TraitIntervention):
    """Holds the projection onto a vector at `value` or below; at all tokens, unless `where` says.

    Example:
        Cap("behavioral/refusal", 1.5, layers=[8, 12], where="response")
    """

    kind = "cap"
    form = "TRAIT:VALUE@LAYERS[:WHERE]"
    example = f"behavioral/refusal:1.5@16, with {LAYER_FORMS}, and where: {FORMS}"
    number_name = "value"

    def __init__(
        self,
        vector: Any,
        value: float,
        layers: SupportsIndex | Iterable[SupportsIndex] | str = AUTO,
        where: str | None = None,
    ):
        self._settle(vector, value, layers, where)


KINDS: dict[str, type[TraitIntervention]] = {each.kind: each for each in (Steer, Ablate, Cap)}
