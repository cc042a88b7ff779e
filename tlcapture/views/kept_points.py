"""Which residual points of a model a capture keeps: all of them, or some layers, or some points of each.

    kept = KeptPoints(30, layers=(8, 12, 16), points=("residual_out",))
    kept.places                     # (18, 26, 34): where these lie among the 61 points of the whole model
    kept.row(12, "residual_out")    # 1: where one lies in a buffer of the kept ones

`residual_in` of a layer is `residual_out` of the one before it: where both are kept they are one row.
Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex

from tlcapture.errors import InputError, StorageError
from tlcapture.text import as_ranges
from tlcapture.views.hooks import POINTS


def point_index(layer: int, point: str) -> int:
    """Where a layer's residual point lies among those of the whole model, in the order they are computed."""
    if point not in POINTS:
        raise InputError(f"no residual point {point!r}: choose one of {', '.join(POINTS)}, attn_out")
    return 2 * layer + POINTS.index(point)


@dataclass(frozen=True)
class KeptPoints:
    """The layers and points that are kept of a model of `n_layers`, both in the model's order.

    Raises `InputError` for a layer or a point that there is not, and where none is left.
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
    def of(cls, n_layers: int, layers: Iterable[int] = (), points: Iterable[str] = ()) -> KeptPoints:
        """What options ask for: all layers, and all points, where none is named."""
        return cls(n_layers, tuple(layers) or tuple(range(n_layers)), tuple(points) or POINTS)

    @classmethod
    def of_file(cls, metadata: Mapping[str, Any], layers: Iterable[int], points: Iterable[str]) -> KeptPoints:
        """What a file holds, by what it has under `activations`; raises `StorageError` where its metadata, which
        names no layers where all are kept, says otherwise."""
        n_layers, found = int(metadata["n_layers"]), (sorted(layers), [point for point in POINTS if point in points])
        said = (list(metadata.get("layers") or range(n_layers)), list(metadata.get("points") or POINTS))
        if found != said:
            raise StorageError(
                f"it holds {', '.join(found[1])} of layers {as_ranges(found[0])}, but its metadata says "
                f"{', '.join(said[1])} of layers {as_ranges(said[0])}"
            )
        return cls(n_layers, tuple(found[0]), tuple(found[1]))

    @property
    def is_all(self) -> bool:
        return self.layers == tuple(range(self.n_layers)) and self.points == POINTS

    @property
    def has_all_outputs(self) -> bool:
        """Whether `residual_out` of every layer is kept, as the logit lens needs it."""
        return self.layers == tuple(range(self.n_layers)) and "residual_out" in self.points

    @cached_property
    def places(self) -> tuple[int, ...]:
        """What lies in a buffer of the kept points, as indices among those of the whole model, ascending."""
        return tuple(sorted({point_index(layer, point) for layer in self.layers for point in self.points}))

    @cached_property
    def rows(self) -> list[list[int]]:
        """`[layer][point]` of what is kept: where each lies in a buffer of the kept points."""
        row_of = {place: row for row, place in enumerate(self.places)}
        return [[row_of[point_index(layer, point)] for point in self.points] for layer in self.layers]

    def includes(self, other: KeptPoints) -> bool:
        """Whether all that another keeps is kept here."""
        return set(self.layers) >= set(other.layers) and set(self.points) >= set(other.points)

    def row(self, layer: int, point: str) -> int:
        """Where a layer's point lies in a buffer of the kept ones; raises `InputError` for one that is not."""
        self.check_layer(layer)
        place = point_index(layer, point)
        if point not in self.points:
            raise InputError(f"{point} was not kept: {self.described()}; capture again without --points")
        return self.places.index(place)

    def layer_row(self, layer: int) -> int:
        """Where a layer lies among those that are kept; raises like `row`."""
        self.check_layer(layer)
        return self.layers.index(layer)

    def check_layer(self, layer: int) -> None:
        if not isinstance(layer, SupportsIndex):
            raise InputError(f"layer {layer!r} is no number: the model has layers 0 to {self.n_layers - 1}")
        if not 0 <= layer < self.n_layers:
            raise InputError(f"no layer {layer}: the model has layers 0 to {self.n_layers - 1}")
        if layer not in self.layers:
            raise InputError(f"layer {layer} was not kept: {self.described()}; capture again with --layers {layer}")

    def described(self) -> str:
        return f"the capture has {', '.join(self.points)} of layers {as_ranges(self.layers)}"
