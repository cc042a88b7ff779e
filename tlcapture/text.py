"""Text for terminals, pages and messages. A model's output is printed without its control characters.

>>> printable("one\\ntwo\\x1b[2J")
'one⏎two�[2J'
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from tlcapture.errors import InputError
from tlcapture.folder_names import named

NEWLINE = "\u23ce"
REPLACEMENT = "\ufffd"  # a token that holds only some bytes of a character decodes to it
MOST_BYTES = 4  # of a character
BYTE_ORDER_MARK = "\ufeff"  # in front of a text, as some editors write it
_MOST_NAMES = 10  # in a message
_MOST_LINES = 100
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)I?B?", re.ASCII | re.IGNORECASE)


def printable(text: str) -> str:
    """The text with visible symbols in place of newlines and control characters, and folders by their names."""
    return "".join(c if c.isprintable() else {"\n": NEWLINE, "\t": " "}.get(c, REPLACEMENT) for c in named(text))


def shell_join(words: Iterable[str]) -> str:
    """Words as a command line that can be typed into bash or zsh; always a single line.

    >>> shell_join(["capture", "--prompt", "How?\\nWhy?"])
    "capture --prompt $'How?\\\\nWhy?'"
    """
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{_escaped(word)}'" for word in words)


def _escaped(word: str) -> str:
    known = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    return "".join(known.get(c) or (c if c.isprintable() else _as_bytes(c)) for c in word)


def _as_bytes(character: str) -> str:
    """The bytes of a character that a terminal does not show, or of an argument that is not UTF-8."""
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def decoded(data: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, without its byte order mark; raises `UnicodeDecodeError` for anything else."""
    return data.decode("utf-8", errors).removeprefix(BYTE_ORDER_MARK)


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode, without lone surrogates such as those that stand for undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name where it has none.

    A line that ends in a colon goes on with the next one.

    >>> first_line(ValueError("Parameter validation failed:\\nInvalid bucket name"))
    'Parameter validation failed: Invalid bucket name'
    """
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {others[0].strip()}" if first.endswith(":") and others else first)[:200]


def n_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of the common prefix of two texts, or of the tokens of two."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (left, right) in pairs if left != right), min(len(one), len(other)))


def dtype_name(dtype: object) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def format_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`, in powers of 1024."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def parse_bytes(text: str) -> int:
    """`1.5 KiB`, `1.5KB` or `1.5k` as `1536`; raises `InputError` for text that is not a size."""
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a size: expected a number and a unit, for example 500GiB")
    size = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")
    if math.isinf(size):
        raise InputError(f"{text!r} is not a size: it is larger than any number")
    return math.floor(size)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 file`, `2 files`; the plural has an `s` unless it is given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """`: did you mean 'style/formality'?` for a name that is nearly an existing one, or nothing."""
    near = get_close_matches(name, list(existing), n=1, cutoff=0.75)
    return f": did you mean {near[0]!r}?" if near else ""


def beside(name: str, existing: Iterable[str], what: str) -> str:
    """The end of an error about an unknown name: the one that was probably meant, and the existing ones.

    `: did you mean 'short'? existing sets: long, short`, or `; existing sets: none`. Of many names, the most similar
    ones come first.
    """
    names = list(existing)
    return f"{did_you_mean(name, names) or ';'} {what}: {listed(names, near=name)}"


def listed(names: Iterable[str], *, near: str = "") -> str:
    """Names for a message: all of up to ten; of more the first ten, those that resemble `near` before others.

    >>> listed(f"set_{number}" for number in range(200))
    'set_0, set_1, set_2, set_3, set_4, set_5, set_6, set_7, set_8, set_9 and 190 more'
    """
    found = list(names)
    if len(found) <= _MOST_NAMES:
        return ", ".join(found) or "none"
    first = dict.fromkeys([*get_close_matches(near, found, n=_MOST_NAMES), *found])
    return f"{', '.join(list(first)[:_MOST_NAMES])} and {len(found) - _MOST_NAMES} more"


def first_lines(lines: Sequence[object], rest: str = "") -> list[str]:
    """Lines to print, of very many the first ones and their number; `rest` says where the others are.

    >>> first_lines(["a"] * 10_000, ": in the log")[-1]
    'and 9,900 more: in the log'
    """
    found = list(map(str, lines[:_MOST_LINES]))
    return found if len(lines) <= _MOST_LINES else [*found, f"and {len(lines) - _MOST_LINES:,} more{rest}"]


def layers_named(layers: Sequence[int]) -> str:
    """`layer 12`, or `layers 8, 12, 16 to 18`."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {as_ranges(layers)}"


def as_ranges(numbers: Iterable[int]) -> str:
    """Numbers as text, runs of more than two as a range: `0 to 29`, or `8, 12, 16 to 18`; `none` for no numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else list(map(str, run)) for run in runs]
    return ", ".join(part for each in parts for part in each) or "none"
