"""The tokens whose activations a capture keeps: all, or some of the response.

    kept = KeptTokens.parse("first:20")
    kept.of(n_prompt=12, n_tokens=62).kept      # (12, 13, ..., 31): indices over prompt and response as one sequence

Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tlcapture.errors import InputError

FORMS = "response|last|first:N|A:B"
_FIRST = re.compile(r"first:(\d{1,4000})", re.ASCII)  # Python reads no number of more digits than about that
_SLICE = re.compile(r"(-?\d{1,4000})?:(-?\d{1,4000})?", re.ASCII)


@dataclass(frozen=True)
class Positions:
    """The tokens of a prompt and its response whose activations are held.

    Attributes:
        kept: their indices over prompt and response as one sequence, ascending.
        n_prompt: the number of tokens of the prompt.
        n_tokens: the number of tokens of prompt and response.

    Raises `ValueError` for indices that are not ascending, or that no token has.
    """

    kept: tuple[int, ...]
    n_prompt: int
    n_tokens: int

    def __post_init__(self) -> None:
        if any(one >= other for one, other in pairwise(self.kept)):
            raise ValueError("positions: expected ascending indices of tokens, each once")
        if self.kept and not (self.kept[0] >= 0 and self.kept[-1] < self.n_tokens):
            raise ValueError(f"positions: {self.kept[0]} to {self.kept[-1]} of {self.n_tokens} tokens")

    @classmethod
    def of(cls, kept: Iterable[int] | None, n_prompt: int, n_tokens: int) -> Positions:
        """The named tokens; all if they are `None`, as in the metadata of a capture that holds all."""
        return cls(tuple(range(n_tokens) if kept is None else kept), n_prompt, n_tokens)

    @property
    def is_all(self) -> bool:
        """Whether activations of every token are held."""
        return len(self.kept) == self.n_tokens

    @property
    def stated(self) -> tuple[int, ...] | None:
        """The held tokens as files state them, and as `of` takes them: `None` if all are held."""
        return None if self.is_all else self.kept

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of the prompt."""
        return tuple(each for each in self.kept if each < self.n_prompt)

    @property
    def response(self) -> tuple[int, ...]:
        """The tokens of the response, as indices over the response alone."""
        return tuple(each - self.n_prompt for each in self.kept if each >= self.n_prompt)

    @property
    def with_next(self) -> tuple[int, ...]:
        """The tokens that have a next one."""
        return tuple(each for each in self.kept if each < self.n_tokens - 1)

    def includes(self, other: Positions) -> bool:
        """Whether everything that `other` holds is held here too."""
        return set(self.kept) >= set(other.kept)

    def rows_in(self, held: Positions) -> list[int] | None:
        """The row of each token among the rows of `held`, which includes them all; `None` if they are the same."""
        row_of = {position: row for row, position in enumerate(held.kept)}
        return None if self.kept == held.kept else [row_of[position] for position in self.kept]

    def has_all(self, start: int, stop: int) -> bool:
        """Whether every token from `start` to before `stop` is held."""
        if self.is_all:
            return stop <= start or (start >= 0 and stop <= self.n_tokens)
        return sum(start <= each < stop for each in self.kept) == max(0, stop - start)

    def record(self) -> dict[str, Any]:
        """The key `positions` of a file; empty if all are held."""
        return {} if self.is_all else {"positions": list(self.kept)}

    def described(self) -> str:
        """The held tokens, as a clause for messages."""
        if not self.kept:
            return f"none of {self.n_tokens} tokens was kept"
        if len(self.kept) == 1:
            return f"token {self.kept[0]} of {self.n_tokens} was kept"
        runs = [self.kept[0]]
        runs += [other for one, other in pairwise(self.kept) if other != one + 1]
        which = f"{self.kept[0]} to {self.kept[-1]}" if len(runs) == 1 else f"{len(self.kept)}"
        return f"tokens {which} of {self.n_tokens} were kept"


@dataclass(frozen=True)
class KeptTokens:
    """A slice of the response whose activations are kept, written as `text`."""

    text: str
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> KeptTokens:
        """Read `response`, `last`, `first:N` (of the response), or `A:B`, a slice of the response as in Python.

        Raises `InputError` for any other text, and for a slice that is empty for every response.
        """
        written = text.strip() if isinstance(text, str) else ""
        if written == "response":
            return cls(written)
        if written == "last":
            return cls(written, -1, None)
        first, sliced = _FIRST.fullmatch(written), _SLICE.fullmatch(written)
        if first:
            found = cls(written, None, int(first[1]))
        elif sliced:
            found = cls(written, *(None if each is None else int(each) for each in sliced.groups()))
        else:
            raise InputError(
                f"{text!r} does not name tokens: expected response, last, first:N or A:B, a slice of the response "
                "such as 10:20, -5: or :100"
            )
        if found._is_always_empty:
            raise InputError(f"{text!r} keeps no token of any response: A must be less than B, and N at least 1")
        return found

    def of(self, n_prompt: int, n_tokens: int) -> Positions:
        """The tokens that are kept of a prompt and its response; none if the response is too short."""
        response = range(n_prompt, n_tokens)[self.start : self.stop]
        return Positions(tuple(response), n_prompt, n_tokens)

    @property
    def _is_always_empty(self) -> bool:
        start, stop = self.start or 0, self.stop
        return stop is not None and (stop == 0 or ((start < 0) == (stop < 0) and start >= stop))


def kept_of(tokens: KeptTokens | None, n_prompt: int, n_tokens: int) -> Positions:
    """The tokens that a choice keeps of a prompt and its response; all without a choice."""
    return Positions.of(None, n_prompt, n_tokens) if tokens is None else tokens.of(n_prompt, n_tokens)


def stated_positions(content: Mapping[str, Any] | Any, n_prompt: int, n_tokens: int) -> Positions:
    """The tokens that a file or its metadata states under `positions`; all if there is no such key.

    Raises `ValueError` for positions that no token has.
    """
    found = content.get("positions") if isinstance(content, Mapping) else getattr(content, "positions", None)
    return Positions.of(found, n_prompt, n_tokens)


def spread_rows(rows: Sequence[Any], positions: Positions, missing: Any) -> list[Any]:
    """One entry per token: the row of a held token, `missing` for the others."""
    found = [missing] * positions.n_tokens
    for position, row in zip(positions.kept, rows, strict=True):
        found[position] = row
    return found
