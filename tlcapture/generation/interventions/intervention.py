"""Interventions: changes to a model's activations while it runs.

    with applied(model, [Add(layer=12, addend=vector)]):
        step = model.step(...)

They are TransformerLens hooks, so they work on every engine, and captured activations include the change. Several at
one layer change the activation one after the other, in the order in which they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tlcapture.generation.interventions.where import EVERYWHERE, FROM_LAST_PROMPT_TOKEN, Where
from tlcapture.models.loading import Model
from tlcapture.models.recordable_hooks import RecordableHooks
from tlcapture.models.streams import upload
from tlcapture.shapes import Rows, RowVectors, Vector
from tlcapture.views.hooks import hook

ALL_POSITIONS = None


@dataclass(frozen=True, eq=False)
class RowMask:
    """The rows whose next token is changed: a buffer `[batch, 1]` that stays in place and is refilled."""

    rows: Tensor


# Positions of a pass: all of them, some rows of a step of one token, or a mask `[batch, pos]` of the last ones. The
# rows of a pass in several micro-batches are one after the other in the mask.
Positions: TypeAlias = RowMask | Tensor | None
HookFunction = Callable[..., Any]  # of TransformerLens: activation and hook point -> activation, or None


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention(ABC):
    """A change to `residual_out` of a layer; `where` are the tokens at which a generation applies it."""

    layer: int
    where: Where = EVERYWHERE

    @property
    def hook_name(self) -> str:
        """The TransformerLens hook point at which the activation is changed."""
        return hook("residual_out", self.layer)

    @abstractmethod
    def change(self, activation: Tensor) -> Tensor:
        """The changed activation `[batch, pos, d_model]`, as a new tensor of the given shape, device and dtype."""

    @abstractmethod
    def to(self, device: torch.device) -> Intervention:
        """The intervention with its vectors on a device, so that no pass has to copy them."""

    @property
    def is_by_row(self) -> bool:
        """Whether rows of a batch are changed differently."""
        return False

    def of_rows(self, rows: Rows) -> Intervention:
        """The intervention for a batch in which only some rows `[batch]` are left."""
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Intervention):
    """Adds `addend`: one vector for all rows of a batch, or one per row."""

    addend: Vector | RowVectors
    where: Where = FROM_LAST_PROMPT_TOKEN

    def change(self, activation: Tensor) -> Tensor:
        """The activation plus the addend at every position.

        Raises `ValueError` if addends are by row and the batch has another number of rows.
        """
        addend = self.addend.to(activation.device, activation.dtype)
        if not self.is_by_row:
            return activation + addend
        if len(addend) != len(activation):
            raise ValueError(f"addends of {len(addend)} rows for a batch of {len(activation)}")
        return activation + addend.unsqueeze(1)

    def to(self, device: torch.device) -> Add:
        """With the addend on a device."""
        return replace(self, addend=self.addend.to(device))

    @property
    def is_by_row(self) -> bool:
        """Whether there is one addend per row."""
        return self.addend.ndim == 2

    def of_rows(self, rows: Rows) -> Add:
        """The addends of the rows that are left."""
        if not self.is_by_row:
            return self
        kept = upload(rows.nonzero()[:, 0].tolist(), self.addend.device)
        return replace(self, addend=self.addend.index_select(0, kept))


@dataclass(frozen=True, eq=False, kw_only=True)
class Remove(Intervention):
    """Removes the component along `direction`, a vector of length 1."""

    direction: Vector

    def change(self, activation: Tensor) -> Tensor:
        """The activation without the component, computed in float32 or better."""
        return _less(activation, self.direction, lambda along: along)

    def to(self, device: torch.device) -> Remove:
        """With the direction on a device."""
        return replace(self, direction=self.direction.to(device))


@dataclass(frozen=True, eq=False, kw_only=True)
class Limit(Intervention):
    """Holds the projection onto `direction`, a vector of length 1, at `most` or below."""

    direction: Vector
    most: float

    def change(self, activation: Tensor) -> Tensor:
        """The activation without the excess of its projection, computed in float32 or better."""
        return _less(activation, self.direction, lambda along: (along - self.most).clamp_(min=0))

    def to(self, device: torch.device) -> Limit:
        """With the direction on a device."""
        return replace(self, direction=self.direction.to(device))


def _less(activation: Tensor, direction: Vector, excess: Callable[[Tensor], Tensor]) -> Tensor:
    """The activation less some of its component along a direction, as a function of its projection."""
    wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
    unit = direction.to(wide.device, wide.dtype)
    along = (wide @ unit).unsqueeze(-1)
    return torch.addcmul(wide, excess(along), unit, value=-1).to(activation.dtype)


@contextmanager
def applied(model: Model, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Within the context, change the activations of every forward pass at all positions; hooks of the user stay."""
    with acting(model, [(each, ALL_POSITIONS) for each in interventions]):
        yield


@contextmanager
def acting(
    model: Model,
    interventions: Sequence[tuple[Intervention, Positions]],
    hooks: Sequence[tuple[Any, HookFunction]] = (),
) -> Iterator[None]:
    """Within the context, change the activations of every forward pass, each intervention at its own positions.

    `hooks` are TransformerLens's hook functions with the names of their points, and are called first.
    """
    changes = [(each.hook_name, _hook_function(each, positions)) for each, positions in interventions]
    if not changes and not hooks:
        yield
        return
    key = tuple(interventions)
    with model.tl.hooks(fwd_hooks=[*hooks, *changes] if hooks else RecordableHooks(changes, key)):
        yield


def _hook_function(intervention: Intervention, positions: Positions) -> HookFunction:
    if positions is None:
        return lambda activation, hook: intervention.change(activation)
    if isinstance(positions, RowMask):
        return _at_rows(intervention, positions)
    return _by_mask(intervention, positions)


def _at_rows(intervention: Intervention, mask: RowMask) -> HookFunction:
    def change(activation: Tensor, hook: Any) -> Tensor:
        rows = mask.rows[: len(activation)].to(activation.device)[..., None]
        return torch.where(rows, intervention.change(activation), activation)

    return change


def _by_mask(intervention: Intervention, mask: Tensor) -> HookFunction:
    first = 0  # the row of the mask with which the next micro-batch begins

    def change(activation: Tensor, hook: Any) -> Tensor:
        nonlocal first
        n_rows, width = activation.shape[0], min(activation.shape[1], mask.shape[1])
        rows = mask[first : first + n_rows, mask.shape[1] - width :]
        first += n_rows
        part = activation[:, activation.shape[1] - width :]
        changed = torch.where(rows.to(part.device)[..., None], intervention.change(part), part)
        if width == activation.shape[1]:
            return changed
        return torch.cat([activation[:, : activation.shape[1] - width], changed], dim=1)

    return change
