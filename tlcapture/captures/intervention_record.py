"""The record of an intervention in a file, checked when it is read. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from tlcapture.storage.validation import FileContent, Layer, Number

_NUMBERS = {"steer": "coefficient", "cap": "value"}  # the number that belongs to a kind


class InterventionRecord(FileContent):
    """An intervention along vectors, one per layer, or a hook of the user's own, which has a name only."""

    kind: Literal["steer", "ablate", "cap", "hook"]
    layers: list[Layer] = Field(default_factory=list)
    where: str | None = None
    coefficient: Number | None = None
    value: Number | None = None
    typical_norms: list[Number] | None = None
    trait: str | None = None
    experiment: str | None = None
    methods: list[str] = Field(default_factory=list)
    vector_digests: list[str] = Field(default_factory=list)
    hook: str | None = None
    function: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> InterventionRecord:
        if self.kind == "hook":
            lacking = [name for name in ("hook", "function") if getattr(self, name) is None]
        else:
            names = ["where", *([_NUMBERS[self.kind]] if self.kind in _NUMBERS else [])]
            names += [] if self.trait is None else ["experiment"]
            lacking = [name for name in names if getattr(self, name) is None] + ([] if self.layers else ["layers"])
        if lacking:
            raise ValueError(f"the intervention {self.kind!r} lacks {', '.join(lacking)}")
        by_layer: list[Sequence[object]] = [self.vector_digests, *([] if self.trait is None else [self.methods])]
        by_layer += [] if self.typical_norms is None else [self.typical_norms]
        if self.kind != "hook" and any(len(each) != len(self.layers) for each in by_layer):
            raise ValueError(f"the intervention {self.kind!r} does not have a vector for each of its layers")
        return self
