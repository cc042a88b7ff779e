"""The tests' own check of shapes."""

from __future__ import annotations

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from tlcapture.extraction.evaluation import auroc


@pytest.mark.parametrize("test", ["one test", "the next one"])
def test_wrong_shapes_are_refused_in_the_first_calls_of_each_test(test: str) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        auroc(torch.zeros(6), torch.zeros(1, 5, dtype=torch.bool))
    labels = torch.tensor([True, False])
    assert all(auroc(torch.tensor([1.0, 0.0]), labels) == 1 for _ in range(100))
