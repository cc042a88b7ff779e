"""Tokens as people read them: tokens that are bytes of one character are joined to that character."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from tlcapture.text import REPLACEMENT

_AHEAD = 12  # tokens after bytes of characters that say where these end in the text
_JOINER = "\u200d"


def joined(tokens: Sequence[str], text: str) -> list[dict[str, Any]]:
    """Groups of consecutive tokens that make up characters: `start`, `stop` and the `text` that people read.

    `text` is the text of all tokens, with or without special ones. Tokens that are a text by themselves are in no
    group; neither are bytes that `text` does not resolve. Where bytes of several characters follow each other and
    their borders are not certain, these characters are one group.
    """
    pieces: list[tuple[int, int, str]] = []
    at, position = 0, 0
    while at < len(tokens):
        if REPLACEMENT not in tokens[at]:
            position = _after(tokens[at], text, position)
            pieces.append((at, at + 1, tokens[at]))
            at += 1
            continue
        stop = next((end for end in range(at, len(tokens)) if REPLACEMENT not in tokens[end]), len(tokens))
        found = _resolved(tokens[at:stop], tokens[stop : stop + _AHEAD], text, position)
        if found is None:
            pieces += [(number, number + 1, tokens[number]) for number in range(at, stop)]
        else:
            pieces += [(at + start, at + end, shown) for start, end, shown in _split(tokens[at:stop], found)]
            position += sum(map(len, found))
        at = stop
    groups = _by_grapheme(pieces)
    return [{"start": start, "stop": stop, "text": shown} for start, stop, shown in groups if stop - start > 1]


def joined_parts(tokens: Sequence[str], n_prompt: int, prompt: str, response: str) -> list[dict[str, Any]]:
    """`joined` for a prompt and its response, which have a text each."""
    later = [
        {**group, "start": group["start"] + n_prompt, "stop": group["stop"] + n_prompt}
        for group in joined(tokens[n_prompt:], response)
    ]
    return [*joined(tokens[:n_prompt], prompt), *later]


def _after(token: str, text: str, position: int) -> int:
    """The position after a token; a special token is not in every text."""
    return position + len(token) if text.startswith(token, position) else position


def _resolved(tokens: Sequence[str], ahead: Sequence[str], text: str, position: int) -> list[str] | None:
    """The text of a run of tokens with bytes in it: for each stretch of plain text or of bytes, what it reads.

    It ends where the text goes on with the tokens `ahead`, of which some may be special and not in the text.
    """
    stretches = _stretches(tokens)
    borders = _borders(stretches, text, position)
    parts = [ahead[first:last] for first in range(len(ahead)) for last in range(len(ahead), first, -1)]
    followed = dict.fromkeys("".join(each).partition(REPLACEMENT)[0] for each in parts)
    whole = ["".join(ahead)] if len(ahead) < _AHEAD else []  # tokens that are the last of the text
    for end, is_last in [*((each, True) for each in whole), *((each, False) for each in followed if each), ("", True)]:
        for at in borders[-1]:
            if text.startswith(end, at) and (not is_last or at + len(end) == len(text)):
                return _between(borders, text, at)
    return None


def _stretches(tokens: Sequence[str]) -> list[str]:
    return re.findall(f"{REPLACEMENT}+|[^{REPLACEMENT}]+", "".join(tokens))


def _borders(stretches: Sequence[str], text: str, position: int) -> list[dict[int, int]]:
    """Where stretches may end in a text, from `position` on: for each of them, its end and where it then begins.

    The first entry is of nothing. Of several beginnings that lead to an end, the first one counts.
    """
    borders = [{position: position}]
    for stretch in stretches:
        ends: dict[int, int] = {}
        for at in borders[-1]:
            for length in _lengths(stretch, text, at):
                ends.setdefault(at + length, at)
        borders.append(ends)
    return borders


def _between(borders: Sequence[dict[int, int]], text: str, end: int) -> list[str]:
    """The texts of the stretches, of which the last one ends at `end`."""
    found = []
    for begins in borders[:0:-1]:
        found.append(text[begins[end] : end])
        end = begins[end]
    return found[::-1]


def _lengths(stretch: str, text: str, at: int) -> Iterator[int]:
    """The possible lengths of a stretch in a text: its own, or of characters that have at least 2 of its marks each."""
    if text.startswith(stretch, at):
        yield len(stretch)
    if stretch[0] == REPLACEMENT:
        n_bytes = 0
        for length, character in enumerate(text[at : at + len(stretch) // 2], start=1):
            if character < "\x80":
                return
            n_bytes += _n_bytes(character)
            if n_bytes >= len(stretch):
                yield length


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _split(tokens: Sequence[str], resolved: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Start and stop of tokens, and their text, split between characters wherever the borders are certain."""
    owners: list[int] = []  # of each character of the tokens: the number of the unit of text it belongs to
    units: list[str] = []
    for stretch, shown in zip(_stretches(tokens), resolved, strict=True):
        sizes = [1] * len(shown) if stretch == shown else _sizes(len(stretch), shown)
        for unit, size in zip(shown if len(sizes) == len(shown) else [shown], sizes, strict=True):
            owners += [len(units)] * size
            units.append(unit)
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    start = 0
    for stop in range(1, len(tokens) + 1):
        border = ends[stop]
        if stop == len(tokens) or owners[border - 1] != owners[border]:
            yield start, stop, "".join(units[owners[ends[start]] : owners[border - 1] + 1])
            start = stop


def _sizes(n_marks: int, shown: str) -> list[int]:
    """How many marks each character has, if that is certain: from 2 to its number of bytes; else one number for all."""
    most = [_n_bytes(character) for character in shown]
    if n_marks == 2 * len(shown):
        return [2] * len(shown)
    return most if n_marks == sum(most) else [n_marks]


def _by_grapheme(pieces: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Pieces with accents, vowel signs, and parts of an emoji joined to their base."""
    found: list[tuple[int, int, str]] = []
    for start, stop, shown in pieces:
        if found and shown and _continues(found[-1][2], shown[0]):
            before = found.pop()
            start, shown = before[0], before[2] + shown
        found.append((start, stop, shown))
    return found


def _continues(before: str, character: str) -> bool:
    if before == "" or before[-1].isspace():
        return False
    is_skin = "\U0001f3fb" <= character <= "\U0001f3ff"
    return before[-1] == _JOINER or character == _JOINER or is_skin or unicodedata.category(character)[0] == "M"
