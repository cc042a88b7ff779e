"""Calibrations against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tlcapture.extraction.calibrating import calibrations
from tlcapture.traits.calibration import Calibration, CalibrationRecord, merged_calibrations, shifted

LABELS = torch.tensor([True, True, True, False, False])


def test_means_and_pooled_deviation_are_those_of_the_projections() -> None:
    activations, vectors = torch.randn(2, 5, 8), torch.randn(2, 8) * 30
    found = calibrations(vectors, activations, LABELS, [3, 7])
    assert list(found) == ["3", "7"]
    for row, layer in enumerate(found):
        scores = (activations[row].double() @ vectors[row].double() / vectors[row].double().norm()).numpy()
        positive, negative = scores[:3], scores[3:]
        assert found[layer]["positive_mean"] == pytest.approx(positive.mean(), rel=1e-5)
        assert found[layer]["negative_mean"] == pytest.approx(negative.mean(), rel=1e-5)
        pooled = np.sqrt((2 * positive.var(ddof=1) + negative.var(ddof=1)) / 3)
        assert found[layer]["pooled_sd"] == pytest.approx(pooled, rel=1e-5)


def test_one_example_a_side_has_no_deviation_and_one_side_no_calibration() -> None:
    activations, vectors = torch.randn(1, 3, 8), torch.randn(1, 8)
    found = calibrations(vectors, activations, torch.tensor([True, False, False]), [0])
    assert found["0"]["pooled_sd"] is None
    assert calibrations(vectors, activations, torch.ones(3, dtype=torch.bool), [0]) == {}


def test_the_negative_mean_is_at_0_the_positive_at_1_whichever_is_larger() -> None:
    for negative, positive in ((-3.0, 5.0), (40.0, -2.0)):
        scale = Calibration(negative, positive)
        assert scale.calibrated(np.array([negative, (negative + positive) / 2, positive])).tolist() == [0.0, 0.5, 1.0]


def test_equal_means_give_no_scale() -> None:
    assert Calibration.of_record(CalibrationRecord(negative_mean=1.0, positive_mean=1.0)) is None
    assert Calibration.of_record(None) is None


def test_shifting_moves_means_and_leaves_deviations() -> None:
    record = {"negative_mean": 1.0, "positive_mean": 3.0, "pooled_sd": 0.5}
    moved = shifted({**record, "held_out": record}, 2.0)
    expected = {"negative_mean": -1.0, "positive_mean": 1.0, "pooled_sd": 0.5}
    assert moved == {**expected, "held_out": expected}


def test_new_calibrations_replace_those_of_the_same_vectors_alone() -> None:
    before = {"probe": {"0": {"negative_mean": 1.0}, "1": {"negative_mean": 2.0}}}
    new = {"probe": {"1": {"negative_mean": 9.0}}, "mean_diff": {"1": {"negative_mean": 3.0}}}
    assert merged_calibrations(before, new) == {
        "probe": {"0": {"negative_mean": 1.0}, "1": {"negative_mean": 9.0}},
        "mean_diff": {"1": {"negative_mean": 3.0}},
    }
    assert merged_calibrations(None, None) == {}
