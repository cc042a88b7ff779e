"""Rounding to significant digits, against Python's own formatting."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import NumericalError
from tlcapture.rounding import round_significant


@given(st.lists(st.floats(-1e18, 1e18).filter(lambda x: x == 0 or abs(x) > 1e-18), max_size=20), st.integers(1, 9))
def test_rounds_as_python_formats(numbers: list[float], digits: int) -> None:
    rounded = round_significant(numbers, digits).tolist()
    for number, result in zip(numbers, rounded, strict=True):
        # At a tie of the decimal expansion either neighbour is right.
        unit = 10.0 ** (len(f"{abs(number):.0f}") - digits) if abs(number) >= 1 else abs(number) * 10.0 ** (1 - digits)
        assert result == pytest.approx(float(f"{number:.{digits - 1}e}"), abs=1.0001 * unit)
        assert abs(result - number) <= 0.51 * unit * 10 if number else result == 0


@given(st.floats(0, 1e300), st.integers(1, 8))
def test_prints_no_more_digits_than_asked_for(number: float, digits: int) -> None:
    text = orjson.dumps(float(round_significant(number, digits))).decode()
    mantissa = text.lower().split("e")[0].replace(".", "").replace("-", "").strip("0")
    assert len(mantissa) <= digits


@given(st.lists(st.floats(-1e300, 1e300), min_size=1), st.integers(1, 8))
def test_rounding_twice_changes_nothing(numbers: list[float], digits: int) -> None:
    once = round_significant(numbers, digits)
    assert round_significant(once, digits).tolist() == once.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_never_written(bad: float) -> None:
    with pytest.raises(NumericalError, match="1 of 3 numbers are NaN or inf"):
        round_significant([1.0, bad, 2.0], 4)
