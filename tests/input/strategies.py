"""Hypothesis strategies that damage a valid file in many ways."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evidence import Evidence

DEEP = 100_000
ODD_NUMBERS = {
    "NaN and inf": ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"],
    "huge numbers": ["1" + "0" * 400, "18446744073709551616", "9223372036854775807", "-9223372036854775809", "1e308",
                     "1e19", "2147483648", "1" * 5000],
    "small numbers": ["-1", "0", "-0.0", "3.7", "1.0", "5e-324", "1e-400"],
}  # fmt: skip
ODD_TEXTS = ["", " ", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "-rf", "\x1b[2J", "\u202e", "x" * 300,
             "\n", "line\nbreak", "1", "true", "null", "\u0661", "\ud83d\ude00"]  # fmt: skip
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b\n"]), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip
_RAW = "@raw@"


@dataclass(frozen=True)
class Damaged:
    """The bytes of a damaged file, and the kind of damage."""

    kind: str
    data: bytes

    def put(self, path: Path) -> Path:
        """Write the file, with its folders; returns its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        return path


def paths_within(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each value within a JSON value, starting with the whole value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from paths_within(each, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with the value at `at` replaced by `new`."""
    if not at:
        return new
    changed = copy.deepcopy(value)
    parent = changed
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = new
    return changed


def without(value: Any, at: tuple[Any, ...]) -> Any:
    """A copy without the value at `at`."""
    changed = copy.deepcopy(value)
    parent = changed
    for key in at[:-1]:
        parent = parent[key]
    del parent[at[-1]]
    return changed


def with_literal(value: Any, at: tuple[Any, ...], literal: str) -> bytes:
    """A JSON file with a literal at `at` that Python's JSON encoder would not write."""
    return json.dumps(replaced(value, at, _RAW)).replace(f'"{_RAW}"', literal).encode()


@st.composite
def damaged_json(draw: st.DrawFn, value: Any, kind: str | None = None) -> Damaged:
    """A file with the content `value`, damaged in the given way or in a random one."""
    kind = kind or draw(st.sampled_from(KINDS))
    return Damaged(kind, draw(_MAKERS[kind](value, sorted(paths_within(value), key=repr))))


def _at(ways: list[tuple[Any, ...]], make: Callable[[tuple[Any, ...]], st.SearchStrategy[bytes]]) -> Any:
    return st.sampled_from(ways).flatmap(make)


def _literals(name: str) -> Callable[[Any, list[tuple[Any, ...]]], Any]:
    return lambda value, ways: _at(
        ways, lambda at: st.sampled_from(ODD_NUMBERS[name]).map(lambda literal: with_literal(value, at, literal))
    )


def _encoded(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False)
    encodings = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037"]
    bad = [b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\0"]
    cut = st.integers(0, len(text)).flatmap(
        lambda index: st.sampled_from(bad).map(lambda b: text[:index].encode() + b + text[index:].encode())
    )
    return st.sampled_from(encodings).map(text.encode) | cut


def _duplicated(value: Any, at: tuple[Any, ...], new: Any) -> bytes:
    """A JSON object with a duplicate key, whose first value is `new`."""
    key = next(iter(value))
    return f"{{{json.dumps(key)}: {json.dumps(new)}, {json.dumps(value)[1:]}".encode()


_NESTED = [b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b"[" * 900 + b"]" * 900]
_NOT_JSON = [b"", b" ", b"\0" * 10, b"null", b"{", b"PK\x03\x04", b"'a'"]
_MAKERS: dict[str, Callable[[Any, list[tuple[Any, ...]]], st.SearchStrategy[bytes]]] = {
    "wrong types": lambda value, ways: _at(
        ways, lambda at: ANY_JSON.map(lambda new: json.dumps(replaced(value, at, new)).encode())
    ),
    "missing keys": lambda value, ways: st.sampled_from(ways[1:] if () in ways[:1] else [w for w in ways if w]).map(
        lambda at: json.dumps(without(value, at)).encode()
    ),
    "wrong shapes": lambda value, ways: st.sampled_from(_lists(value, ways)).flatmap(
        lambda at: st.sampled_from(_reshaped(value, at)).map(lambda new: json.dumps(replaced(value, at, new)).encode())
    ),
    "NaN and inf": _literals("NaN and inf"),
    "huge numbers": _literals("huge numbers"),
    "small numbers": _literals("small numbers"),
    "deep nesting": lambda value, ways: st.sampled_from(_NESTED) | _at(
        ways, lambda at: st.sampled_from(_NESTED).map(lambda nest: with_literal(value, at, nest.decode()))
    ),
    "wrong encoding": lambda value, ways: _encoded(value),
    "lone surrogates": lambda value, ways: _at(
        ways, lambda at: st.sampled_from(['"\\ud800"', '"\\udc00x"']).map(lambda text: with_literal(value, at, text))
    ),
    "odd text": lambda value, ways: _at(
        ways, lambda at: st.sampled_from(ODD_TEXTS).map(lambda new: json.dumps(replaced(value, at, new)).encode())
    ),
    "duplicated keys": lambda value, ways: ANY_JSON.map(lambda new: _duplicated(value, (), new)),
    "truncated": lambda value, ways: st.integers(0, len(json.dumps(value)) - 1).map(
        lambda size: json.dumps(value).encode()[:size]
    ),
    "empty or not JSON": lambda value, ways: st.sampled_from(_NOT_JSON) | st.binary(max_size=40),
}  # fmt: skip
KINDS = sorted(_MAKERS)


def _lists(value: Any, ways: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    def found(at: tuple[Any, ...]) -> Any:
        inner = value
        for key in at:
            inner = inner[key]
        return inner

    return [at for at in ways if isinstance(found(at), list)] or [()]


def _reshaped(value: Any, at: tuple[Any, ...]) -> list[Any]:
    """Variants of a list: empty, one shorter, one longer, nested, with a list as last item, and reversed."""
    for key in at:
        value = value[key]
    items = value if isinstance(value, list) else [value]
    return [[], items[:-1], [*items, *items[-1:]], [items], [*items[:-1], [items[-1:]]], list(reversed(items))]


def at_most(examples: int) -> int:
    """How many examples of a property to try: all for docs/reliability.md, and a third of them in every other run."""
    return examples if settings.get_current_profile_name() == "thorough" else max(examples // 3, min(examples, 50))


def try_all(
    evidence: Evidence, reader: str, files: st.SearchStrategy[Damaged], check: Callable[[Damaged], object],
    examples: int = 300,
) -> None:  # fmt: skip
    """Check a reader on many files, and add the number of each kind of damage to the evidence."""
    counts: Counter[str] = Counter()

    @settings(max_examples=at_most(examples), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(files)
    def attempt(file: Damaged) -> None:
        check(file)
        counts[file.kind] += 1

    attempt()
    for kind, count in counts.items():
        evidence.tried(reader, kind, count)


def some_of_each(names: Iterable[str], kinds: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Pairs of a name and a kind of damage: `count` kinds for each name, in rotation, so that every kind is used."""
    kinds = itertools.cycle(sorted(kinds))
    return [(name, kind) for name in sorted(names) for kind in itertools.islice(kinds, count)]


def check_refusal(error: object, *paths: Path) -> None:
    """Assert that an error is one line that names one of the paths and does not come from the tests' type checker."""
    text = str(error)
    assert any(str(path) in text for path in paths), text
    assert len(text.splitlines()) == 1, text
    assert len(text) < 2000, text
    assert "Type-check" not in text, text
