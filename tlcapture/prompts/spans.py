"""Spans tell which tokens of a prompt and its response are which turn, thinking, or answer. Loads no torch.

    {"kind": "turn", "role": "user", "start": 3, "stop": 10}

`start` and `stop` are indices over the tokens of prompt and response together. Tokens that the chat template writes
between texts are spans of the kind `template`, whose role is null. A turn that cannot be found has null in place of
`start` and `stop`, and a `reason`. A token across the boundary of two spans belongs to the one that has more of its
characters, or to the earlier one if they have equally many.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

from pydantic import model_validator

from tlcapture.storage.validation import Count, FileContent

Kind = Literal["turn", "thinking", "answer", "template"]
Role = Literal["system", "user", "assistant", "tool"]
Offsets = Sequence[tuple[int, int]]  # the characters of each token, from the first to the one after the last

NO_OFFSETS = "the tokenizer does not say which characters its tokens have"
NO_TEXT = "it has no text"
SEVERAL_PLACES = "the chat template writes its text in several places"
NO_TOKEN = "no token has most of its characters here"


class TokenSpan(FileContent):
    """A run of tokens with one meaning; `start` and `stop` are `None`, with a reason, if it was not found."""

    kind: Kind
    role: Role | None
    start: Count | None
    stop: Count | None
    reason: str | None = None

    @model_validator(mode="after")
    def _has_tokens_or_a_reason(self) -> TokenSpan:
        if self.start is None or self.stop is None:
            if (self.start, self.stop) != (None, None) or not self.reason:
                raise ValueError("start and stop: expected two numbers, or null for both and a reason")
        elif self.start >= self.stop:
            raise ValueError(f"tokens {self.start} to {self.stop}: expected at least one token")
        return self

    def __repr__(self) -> str:
        name = self.kind if self.role is None else f"{self.role} {self.kind}"
        return f"<{name}, tokens {self.start} to {self.stop}>" if self.found else f"<{name}: {self.reason}>"

    @property
    def found(self) -> tuple[int, int] | None:
        """The first token and the one after the last; `None` for a span without tokens."""
        return None if self.start is None or self.stop is None else (self.start, self.stop)

    def to_json(self) -> dict[str, Any]:
        """The span as files hold it."""
        written = {"kind": self.kind, "role": self.role, "start": self.start, "stop": self.stop}
        return written if self.reason is None else {**written, "reason": self.reason}


class TextSpan(NamedTuple):
    """A run of characters with one meaning."""

    start: int
    stop: int
    kind: Kind
    role: Role | None


def spans_of_text(known: Iterable[TextSpan], length: int, offsets: Offsets, first: int = 0) -> list[TokenSpan]:
    """The spans of the tokens of a text of `length` characters; text that is in none of the `known` is template.

    Args:
        known: spans of the text, without overlaps.
        offsets: the characters of each token.
        first: the index of the first token.

    A turn that has no token becomes a span without tokens.
    """
    texts = _without_gaps(known, length)
    starts = [each.start for each in texts]
    numbers: list[int] = []
    for start, stop in offsets:
        number = _number_of(start, stop, starts, length)
        numbers.append(max(number, numbers[-1]) if numbers else number)
    found: dict[int, tuple[int, int]] = {}
    at = first
    for number, tokens in groupby(numbers):
        found[number] = (at, at := at + len(list(tokens)))
    spans = []
    for number, each in enumerate(texts):
        if number in found:
            spans.append(TokenSpan(kind=each.kind, role=each.role, start=found[number][0], stop=found[number][1]))
        elif each.kind == "turn":
            spans.append(unfound(each.role, NO_TOKEN))
    return spans


def unfound(role: Role | None, reason: str) -> TokenSpan:
    """A turn whose tokens are not known."""
    return TokenSpan(kind="turn", role=role, start=None, stop=None, reason=reason)


def check_spans(spans: Sequence[TokenSpan], n_tokens: int) -> None:
    """Raise `ValueError` for spans that overlap, are not in order, or go beyond the tokens."""
    found = [each.found for each in spans if each.found is not None]
    if found and found[-1][1] > n_tokens:
        raise ValueError(f"spans: one ends at token {found[-1][1]} of {n_tokens}")
    for one, other in pairwise(found):
        if one[1] > other[0]:
            raise ValueError(f"spans: one ends at token {one[1]}, and the next begins at {other[0]}")


def labels_of(spans: Sequence[TokenSpan], n_tokens: int) -> list[tuple[str | None, str | None]]:
    """The kind and the role of the span of each token; `None` for tokens without a span."""
    labels: list[tuple[str | None, str | None]] = [(None, None)] * n_tokens
    for span in spans:
        if span.found is not None:
            start, stop = span.found
            labels[start:stop] = [(span.kind, span.role)] * (stop - start)
    return labels


def _without_gaps(known: Iterable[TextSpan], length: int) -> list[TextSpan]:
    """Spans of a whole text, in order: the known ones, and the template's between them."""
    whole: list[TextSpan] = []
    end = 0
    for each in sorted(known):
        start = max(each.start, end)
        if start > end:
            whole.append(TextSpan(end, start, "template", None))
        whole.append(each._replace(start=start, stop=max(start, each.stop)))
        end = whole[-1].stop
    if end < length or not whole:
        whole.append(TextSpan(end, length, "template", None))
    return whole


def _number_of(start: int, stop: int, starts: Sequence[int], length: int) -> int:
    """The number of the span that has most of the characters of a token."""
    first, last = (max(0, bisect_right(starts, at) - 1) for at in (start, max(start, stop - 1)))
    if first == last:
        return first
    edges = [*starts, length]

    def shared(number: int) -> int:
        return min(stop, edges[number + 1]) - max(start, edges[number])

    return max(range(first, last + 1), key=shared)  # the first of several
