"""Calibrations: the positions of a vector's examples along it, as a scale for projections. Loads no torch.

A calibrated score is 0 at the mean projection of the negative examples, and 1 at that of the positive ones, read out
where the vector was: `(score - negative_mean) / (positive_mean - negative_mean)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlcapture.storage.validation import FileContent, Number

CALIBRATION, HELD_OUT = "calibration", "held_out_calibration"  # fields of a vector's metadata


class CalibrationRecord(FileContent):
    """A calibration as files hold it."""

    negative_mean: Number
    positive_mean: Number
    pooled_sd: Number | None = None


@dataclass(frozen=True)
class Calibration:
    """Mean projections of negative and positive examples, and the deviation within a side; units of activations.

    `pooled_sd` is `None` for fewer than two examples per side.
    """

    negative_mean: float
    positive_mean: float
    pooled_sd: float | None = None

    @classmethod
    def of_record(cls, record: CalibrationRecord | None) -> Calibration | None:
        """The calibration of a record; `None` without one, and if both means are equal."""
        if record is None or record.negative_mean == record.positive_mean:
            return None
        return cls(record.negative_mean, record.positive_mean, record.pooled_sd)

    def calibrated(self, scores: Any) -> Any:
        """Scores, a number or an array, on the scale on which the negative mean is 0 and the positive mean 1."""
        return (scores - self.negative_mean) / (self.positive_mean - self.negative_mean)


def recorded_calibration(metadata: Mapping[str, Any], method: str, layer: int) -> dict[str, Any] | None:
    """A vector's calibration from the metadata of its extraction, with that of held-out examples where evaluated."""
    training = _at(metadata, CALIBRATION, method, layer)
    if training is None:
        return None
    held_out = _at(metadata, HELD_OUT, method, layer)
    return dict(training) if held_out is None else {**training, "held_out": dict(held_out)}


def merged_calibrations(
    before: Mapping[str, Mapping[str, Any]] | None, new: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """Calibrations by method and layer, with earlier ones of the same vectors replaced by new ones."""
    before, new = before or {}, new or {}
    return {method: {**before.get(method, {}), **new.get(method, {})} for method in {**before, **new}}


def shifted(record: Mapping[str, Any] | None, by: float) -> dict[str, Any] | None:
    """A recorded calibration for projections from which `by` was subtracted."""
    if record is None:
        return None
    moved = {name: value - by for name, value in record.items() if name.endswith("_mean")}
    held_out = {"held_out": shifted(record["held_out"], by)} if "held_out" in record else {}
    return {**record, **moved, **held_out}


def _at(metadata: Mapping[str, Any], name: str, method: str, layer: int) -> Mapping[str, Any] | None:
    by_method = metadata.get(name) or {}
    found = (by_method.get(method) or {}).get(str(layer))
    return found if isinstance(found, Mapping) else None
