"""Bytes as people write and read them."""

from __future__ import annotations

import math
import re

from tlcapture.errors import InputError

_UNITS = ("B", "KB", "MB", "GB", "TB")
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)I?B?", re.ASCII | re.IGNORECASE)


def format_bytes(count: float) -> str:
    """`1536` as `1.5 KB`, in powers of 1024."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def parse_bytes(text: str) -> int:
    """`1.5 KB`, `1.5KiB` or `1.5k` as `1536`; raises `InputError` for what is no size."""
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is no size: expected a number and a unit, for example 500GB")
    return math.floor(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
