"""The residual points of a model that a capture keeps: all of them, or some layers, or some points of each.

    kept = KeptPoints(30, layers=(8, 12, 16), points=("residual_out",))
    kept.point_indices              # (18, 26, 34): indices among the 61 points of the whole model
    kept.row(12, "residual_out")    # 1: row of a buffer of the kept points

`residual_in` of a layer is `residual_out` of the layer before: if both are kept, they share a row.
Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import index
from typing import Any, SupportsIndex

from tlcapture.errors import InputError, StorageError
from tlcapture.text import layers_named
from tlcapture.views.hooks import POINTS


def point_index(layer: int, point: str) -> int:
    """The index of a layer's residual point among those of the whole model, in the order they are computed.

    Raises `InputError` for a name that is not a residual point.
    """
    if point not in POINTS:
        raise InputError(f"no residual point {point!r}: choose one of {', '.join(POINTS)}, attn_out")
    return 2 * layer + POINTS.index(point)


def from_the_end(layer: Any, n_layers: int) -> Any:
    """A layer, with negative numbers counted from the end: -1 is the last. Anything else is returned unchanged."""
    number = index(layer) if isinstance(layer, SupportsIndex) else 0
    return number + n_layers if -n_layers <= number < 0 else layer


@dataclass(frozen=True)
class KeptPoints:
    """The layers and points that are kept of a model with `n_layers`, both in the model's order.

    Raises `InputError` for a layer or a point that the model does not have, and for an empty selection.
    """

    n_layers: int
    layers: tuple[int, ...]
    points: tuple[str, ...] = POINTS

    def __post_init__(self) -> None:
        for layer in self.layers:
            if not 0 <= layer < self.n_layers:
                raise InputError(f"--layers {layer}: the model has layers 0 to {self.n_layers - 1}")
        for point in self.points:
            point_index(0, point)
        if not self.layers or not self.points:
            raise InputError("no layer or no residual point would be kept")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        object.__setattr__(self, "points", tuple(point for point in POINTS if point in self.points))

    @classmethod
    def of(cls, n_layers: int, layers: Iterable[int] | int = (), points: Iterable[str] | str = ()) -> KeptPoints:
        """The named layers and points, one or several; all of them if none is named."""
        named = (layers,) if isinstance(layers, str) or not isinstance(layers, Iterable) else tuple(layers)
        points = (points,) if isinstance(points, str) else tuple(points)
        if unknown := [layer for layer in named if isinstance(layer, bool) or not isinstance(layer, SupportsIndex)]:
            raise InputError(f"layers {unknown[0]!r}: expected numbers from 0 to {n_layers - 1}")
        if not named and not points:
            return _all_of(n_layers)
        # Python's own numbers: with those of NumPy, a capture could not be opened again.
        return cls(n_layers, tuple(map(index, named)) or tuple(range(n_layers)), points or POINTS)

    @classmethod
    def of_file(cls, metadata: Mapping[str, Any], layers: Iterable[int], points: Iterable[str]) -> KeptPoints:
        """The layers and points under `activations` of a file. Its metadata may leave them out if all are kept.

        Raises `StorageError` if metadata and activations disagree.
        """
        n_layers, found = int(metadata["n_layers"]), (sorted(layers), [point for point in POINTS if point in points])
        stated = (list(metadata.get("layers") or range(n_layers)), list(metadata.get("points") or POINTS))
        if found != stated:
            raise StorageError(
                f"it holds {', '.join(found[1])} of {layers_named(found[0])}, but its metadata states "
                f"{', '.join(stated[1])} of {layers_named(stated[0])}"
            )
        return cls(n_layers, tuple(found[0]), tuple(found[1]))

    @property
    def is_all(self) -> bool:
        """Whether every point of every layer is kept."""
        return self.layers == tuple(range(self.n_layers)) and self.points == POINTS

    def has_outputs(self, layers: Iterable[int] = ()) -> bool:
        """Whether `residual_out` of some layers is kept, by default of every layer, as the logit lens needs it."""
        return set(self.layers) >= set(layers or range(self.n_layers)) and "residual_out" in self.points

    @cached_property
    def point_indices(self) -> tuple[int, ...]:
        """Indices of the kept points among those of the whole model, ascending: the rows of a buffer."""
        return tuple(sorted({point_index(layer, point) for layer in self.layers for point in self.points}))

    @cached_property
    def rows(self) -> list[list[int]]:
        """The row of each kept `[layer][point]` in a buffer of the kept points."""
        row_of = {point: row for row, point in enumerate(self.point_indices)}
        return [[row_of[point_index(layer, point)] for point in self.points] for layer in self.layers]

    def includes(self, other: KeptPoints) -> bool:
        """Whether everything that `other` keeps is kept here too."""
        return set(self.layers) >= set(other.layers) and set(self.points) >= set(other.points)

    def row(self, layer: object, point: str) -> int:
        """The row of a layer's point in a buffer of the kept points; raises `InputError` for a point not kept."""
        wanted = point_index(self.check_layer(layer), point)
        if point not in self.points:
            raise InputError(f"{point} was not kept: {self.described()}; capture again without --points")
        return self.point_indices.index(wanted)

    def check_layer(self, layer: object) -> int:
        """Return a layer as an `int`; raises `InputError` for anything but a layer that is kept."""
        if not isinstance(layer, int | SupportsIndex):  # whether it is an int takes much less time
            raise InputError(f"layer {layer!r} is not a number: the model has layers 0 to {self.n_layers - 1}")
        number = index(layer)
        if not 0 <= number < self.n_layers:
            raise InputError(f"no layer {number}: the model has layers 0 to {self.n_layers - 1}")
        if number not in self.layers:
            raise InputError(f"layer {number} was not kept: {self.described()}; capture again with --layers {number}")
        return number

    def described(self) -> str:
        """The kept layers and points, as a clause for messages."""
        return f"the capture has {', '.join(self.points)} of {layers_named(self.layers)}"


@lru_cache(maxsize=64)
def _all_of(n_layers: int) -> KeptPoints:
    return KeptPoints(n_layers, tuple(range(n_layers)))
