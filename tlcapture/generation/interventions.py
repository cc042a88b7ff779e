"""Interventions: changes to a model's activations while it runs.

    with applied(model, [Steer(layer=12, addend=vector)]):
        step = model.step(...)

They are TransformerLens hooks, so they work on every engine, and captured activations include the change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tlcapture.models.loading import Model
from tlcapture.shapes import Rows, RowVectors, Vector
from tlcapture.views.hooks import hook

ALL_POSITIONS = slice(None)
LAST_POSITION = slice(-1, None)


class Intervention(ABC):
    """A change to the activation at one hook point."""

    @property
    @abstractmethod
    def hook_name(self) -> str:
        """The TransformerLens hook point at which the activation is changed."""

    @abstractmethod
    def change(self, activation: Tensor) -> Tensor:
        """The changed activation `[batch, pos, ...]`, as a new tensor of the given shape, device and dtype."""

    @property
    def is_by_row(self) -> bool:
        """Whether rows of a batch are changed differently."""
        return False

    def of_rows(self, rows: Rows) -> Intervention:
        """The intervention for a batch of which only some rows are left, `[batch]`."""
        return self


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Adds `addend` to `residual_out` of a layer: one vector for all rows of a batch, or one per row."""

    layer: int
    addend: Vector | RowVectors

    @property
    def hook_name(self) -> str:
        """The hook of the layer's `residual_out`."""
        return hook("residual_out", self.layer)

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

    @property
    def is_by_row(self) -> bool:
        """Whether there is one addend per row."""
        return self.addend.ndim == 2

    def of_rows(self, rows: Rows) -> Steer:
        """The addends of the rows that are left."""
        return Steer(self.layer, self.addend[rows]) if self.is_by_row else self


@contextmanager
def applied(model: Model, interventions: Sequence[Intervention], positions: slice = ALL_POSITIONS) -> Iterator[None]:
    """Within the context, change the activations at `positions` of every forward pass; hooks of the user stay."""
    if not interventions:
        yield
        return
    with model.tl.hooks(fwd_hooks=[(each.hook_name, _hook_function(each, positions)) for each in interventions]):
        yield


def _hook_function(intervention: Intervention, positions: slice) -> Callable[..., Tensor]:
    def change(activation: Tensor, hook: Any) -> Tensor:
        part = activation[:, positions]
        if part.shape[1] == activation.shape[1]:
            return intervention.change(activation)
        changed = activation.clone()
        changed[:, positions] = intervention.change(part)
        return changed

    return change
