"""Numbers as they go into JSON: rounded to significant digits, and never NaN or inf.

>>> round_significant([0.123456, 123456.0], 4).tolist()
[0.1235, 123500.0]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tlcapture.errors import NumericalError

WEIGHT_DIGITS = 4
PROBABILITY_DIGITS = 4
PROJECTION_DIGITS = 6
_LARGEST_EXACT_POWER = 22


def round_significant(values: ArrayLike, digits: int) -> NDArray[np.float64]:
    """Round to `digits` significant decimal digits, as float64.

    The result is the double nearest to the rounded decimal, so that it prints with at most `digits`
    digits. Raises `NumericalError` where a value is NaN or inf.
    """
    numbers = np.asarray(values, dtype=np.float64, order="C")
    if not np.isfinite(numbers).all():
        raise NumericalError(f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} numbers are NaN or inf")
    magnitude = np.abs(numbers)
    exponent = np.floor(np.log10(np.where(magnitude > 0, magnitude, 1.0)))
    shift = (digits - 1 - exponent).astype(np.int64)
    # Powers of ten are exact up to 10**22, and a quotient or product of exact numbers rounds once.
    exact = np.abs(shift) <= _LARGEST_EXACT_POWER
    scale = 10.0 ** np.where(exact, np.abs(shift), 0)
    rounded = np.where(shift >= 0, np.rint(numbers * scale) / scale, np.rint(numbers / scale) * scale)
    if not exact.all():
        rounded = np.asarray(rounded)
        rounded[~exact] = [float(f"{number:.{digits - 1}e}") for number in numbers[~exact]]
    return rounded
