"""Rounding to significant digits, against Python's own formatting."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from tlcapture.errors import NumericalError
from tlcapture.storage.rounding import round_significant, rounded_for_json


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


@given(
    arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from([4, 6]),
)
def test_float32_numbers_for_json_print_with_few_digits_and_are_close_to_the_number(
    numbers: NDArray[np.float32], digits: int
) -> None:
    normal = numbers[(numbers == 0) | (np.abs(numbers) >= np.finfo(np.float32).tiny)]
    rounded = rounded_for_json(normal, digits)
    texts = orjson.dumps(rounded, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",") if len(normal) else []
    for text, number in zip(texts, normal.tolist(), strict=True):
        printed = Decimal(text)
        assert len(printed.normalize().as_tuple().digits) <= digits
        assert abs(printed - Decimal(number)) <= abs(Decimal(number)) * Decimal(f"0.5000001e{1 - digits}")


def test_float32_numbers_around_every_power_of_ten_are_rounded_like_all_others() -> None:
    powers = np.array([10.0**exponent for exponent in range(-37, 38)], dtype=np.float32)
    around = np.concatenate([powers, np.nextafter(powers, np.float32(0)), powers * np.float32(0.99999)])
    for group in np.split(around, len(around)):
        expected = round_significant(group, 4)
        assert rounded_for_json(group, 4)[0] == np.float32(expected[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_float32_nan_and_inf_raise(bad: float) -> None:
    with pytest.raises(NumericalError, match="1 of 2 numbers are NaN or inf"):
        rounded_for_json(np.array([1.0, bad], dtype=np.float32), 4)
