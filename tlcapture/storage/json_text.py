"""Reading JSON that others write, finding what reading would lose, and JSON that is kept in memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from tlcapture.errors import StorageError
from tlcapture.text import BYTE_ORDER_MARK

_OTHERS = {
    b"\x1f\x8b": "it is compressed by gzip: decompress it",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}
_LEAST, _MOST = -(2**63), 2**64 - 1  # the integers that are written as they were read


def parsed(data: bytes, path: Path, *, exact: bool = False) -> Any:
    """The value of JSON text; raises `StorageError` with file, line and reason for anything else.

    With `exact`, also for text that cannot be read without losing something.
    """
    try:
        text = data.removeprefix(BYTE_ORDER_MARK.encode())
        value = orjson.loads(text)
        if exact and (reason := lost(text)):
            raise StorageError(f"{path}: {reason}")
        return value
    except orjson.JSONDecodeError as error:
        raise StorageError(f"{path}: {_reason(data, error)}") from None
    except RecursionError:
        raise StorageError(f"{path}: not valid JSON: nested too deeply") from None


def kept_json(value: Any) -> bytes:
    """A value as JSON to keep in memory among many others: what orjson returns occupies 4 KB or more, however short.

    Raises `orjson.JSONEncodeError`, a `TypeError`, for a value that JSON does not hold.
    """
    return bytes(memoryview(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)))


def lost(text: bytes | str) -> str | None:
    """What reading valid JSON would lose: a key that occurs twice in one object, or digits of a long integer."""
    try:
        json.loads(text, object_pairs_hook=_without_repetition, parse_int=_integer)
    except ValueError as error:
        return str(error)
    return None


def _reason(data: bytes, error: orjson.JSONDecodeError) -> str:
    for start, reason in _OTHERS.items():
        if data.startswith(start):
            return f"not valid JSON: {reason}"
    if "not valid UTF-8" in error.msg:
        return "not valid JSON: it is not UTF-8: save it as UTF-8"
    lines = (
        ": JSON lines? Put them into one list, [..., ...]" if error.lineno > 1 and "after document" in error.msg else ""
    )
    return f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}{lines}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object: leave out one of them")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or not _LEAST <= int(digits) <= _MOST:
        shown = digits if len(digits) <= 30 else f"{digits[:30]}..."
        raise ValueError(f"{shown} has more than 64 bits: write it as a text")
    return int(digits)
