"""Numbers as they are written to JSON: rounded to significant digits, and never NaN or inf.

>>> round_significant([0.123456, 123456.0], 4).tolist()
[0.1235, 123500.0]
"""

from __future__ import annotations

from functools import cache
from math import floor, isfinite, log10
from typing import SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tlcapture.errors import NumericalError

WEIGHT_DIGITS = 4
PROBABILITY_DIGITS = 4
PROJECTION_DIGITS = 6
_LARGEST_EXACT_POWER = 22
_EXACT_POWERS = np.array([10.0**power for power in range(_LARGEST_EXACT_POWER + 1)])


def round_significant(values: ArrayLike, digits: int) -> NDArray[np.float64]:
    """Round to `digits` significant decimal digits, as float64.

    The result is the double nearest to the rounded decimal, so it prints with at most `digits` digits.

    Raises:
        NumericalError: a value is NaN or inf.
    """
    numbers = np.asarray(values, dtype=np.float64, order="C")
    if not np.isfinite(numbers).all():
        raise NumericalError(f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} numbers are NaN or inf")
    magnitude = np.abs(numbers)
    exponent = np.floor(np.log10(np.where(magnitude > 0, magnitude, 1.0)))
    shift = (digits - 1 - exponent).astype(np.int64)
    # Powers of ten are exact up to 10**22, and a quotient or product of exact numbers rounds once.
    power = np.abs(shift)
    exact = power <= _LARGEST_EXACT_POWER
    scale = _EXACT_POWERS[np.where(exact, power, 0)]
    rounded = np.rint(numbers * scale) / scale
    if (shift < 0).any():
        rounded = np.where(shift >= 0, rounded, np.rint(numbers / scale) * scale)
    if not exact.all():
        rounded = np.asarray(rounded)
        rounded[~exact] = [float(f"{number:.{digits - 1}e}") for number in numbers[~exact]]
    return rounded


def rounded_or_none(value: SupportsFloat | None, digits: int = PROJECTION_DIGITS) -> float | None:
    """One number as `round_significant` rounds it; `None` in place of an unknown one, NaN or inf."""
    if value is None or not isfinite(value):
        return None
    return float(round_significant(float(value), digits))


def round_number(value: float, digits: int) -> float:
    """Round one number to `digits` significant decimal digits; raises `NumericalError` for NaN or inf."""
    if not isfinite(value):
        raise NumericalError(f"expected a finite number, got {value}")
    return float(f"{value:.{digits - 1}e}")


def rounded_for_json(values: NDArray[np.float32], digits: int) -> NDArray[np.float32]:
    """Round float32 numbers to at most 6 significant decimal digits, as float32.

    This is several times faster than `round_significant`. A float32 distinguishes all decimals of 6 digits, so the
    result prints with at most `digits` digits when it is printed as float32, which orjson does.

    Raises:
        NumericalError: a value is NaN or inf.
    """
    numbers = np.ascontiguousarray(values, dtype=np.float32)
    magnitude = np.abs(numbers)
    largest = float(magnitude.max(initial=0.0))
    if not largest < 10.0**digits:  # NaN too
        return round_significant(numbers, digits).astype(np.float32)
    # The binary exponent gives the decimal one, except for numbers beyond the next power of ten.
    scale = _scales(digits)[magnitude.view(np.int32) >> 23]
    scale /= np.where(magnitude * scale >= 10.0**digits, 10.0, 1.0)
    return (np.rint(numbers * scale) / scale).astype(np.float32)


@cache
def _scales(digits: int) -> NDArray[np.float64]:
    """For each 8-bit exponent of a float32, the power of ten that leaves `digits` digits before the point."""
    smallest = [2.0 ** (bits - 127) for bits in range(256)]
    return np.array([10.0 ** (digits - 1 - floor(log10(number))) for number in smallest])
