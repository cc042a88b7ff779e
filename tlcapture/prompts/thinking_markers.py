"""The markers around the thinking and the answer of a response, and where they cut its text. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tlcapture.prompts.message_spans import THINKING_TAGS
from tlcapture.prompts.spans import Kind, TextSpan

TABLE = "table"  # the source of markers that no tokenizer states
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷")


class Field(NamedTuple):
    """A part of a response between two markers; one without an end goes on to the end of the response."""

    kind: Literal["thinking", "answer"]
    open: Any  # a compiled pattern, of the module re or regex
    close: Any | None


class _Part(NamedTuple):
    """A run of characters between two markers, or outside of them, and whether a marker is next to it."""

    kind: Kind
    start: int
    stop: int
    after_marker: bool
    before_marker: bool

    def trimmed(self, text: str) -> tuple[int, int]:
        """Its start and stop without the white space next to a marker."""
        start, stop = self.start, self.stop
        if self.after_marker:
            start = stop - len(text[start:stop].lstrip())
        if self.before_marker:
            stop = start + len(text[start:stop].rstrip())
        return start, stop


@dataclass(frozen=True)
class ThinkingMarkers:
    """The markers around the parts of a response.

    Attributes:
        source: `response_template`, `reasoning_content` or `table`.
        fields: the marked parts.
        rest: the kind of text outside of them.
        rest_end: the marker that ends such text, if any.
        anchor: the text after which the response begins in the prompt's last part; without one, all of it is read.
        opened_by_prompt: whether the end of a prompt opens the thinking, unless it is switched off.
    """

    source: str
    fields: tuple[Field, ...]
    rest: Literal["answer", "template"] = "answer"
    rest_end: Any | None = None
    anchor: Any | None = None
    opened_by_prompt: bool = False

    def text_spans(self, opening: str, response: str) -> list[TextSpan]:
        """The thinking and the answer within a response, as runs of its characters.

        `opening` is the end of the prompt: what comes after the last message that is not the assistant's.
        """
        text, n_before = opening + response, len(opening)
        found = []
        for part in self._parts(opening, response):
            begin, end = part.trimmed(text)
            begin, end = max(0, begin - n_before), end - n_before
            if part.kind != "template" and begin < end:
                found.append(TextSpan(begin, end, part.kind, "assistant"))
        stripped = response.strip()
        if found or self.rest == "answer" or not stripped or TAG.match(stripped):
            return found
        # Without any marker, since thinking is off: the answer alone.
        ends = [match.start() for each in self.fields if each.close for match in each.close.finditer(response)]
        return [TextSpan(0, min(ends, default=len(response)), "answer", "assistant")]

    def thinks(self, opening: str) -> bool:
        """Whether a response after this end of a prompt begins with thinking, as far as the template says."""
        opened, closed = self.last_in(opening)
        if opened >= 0:
            return closed <= opened
        answers = [match for each in self.fields if each.kind == "answer" for match in each.open.finditer(opening)]
        if any(match.end() == len(opening.rstrip()) for match in answers):
            return False
        return self.source != TABLE and not self.opened_by_prompt

    def is_open(self, opening: str, response: str) -> bool:
        """Whether the thinking goes on at the end of a response so far; `opening` is as in `text_spans`."""
        *_, last = self._parts(opening, response)
        return last.kind == "thinking" and not last.before_marker

    def literals(self) -> tuple[str, str] | None:
        """The opening and the closing marker of the thinking, if they alone decide where it is."""
        if len(self.fields) != 1 or self.rest != "answer" or self.source == TABLE:
            return None
        patterns = [each.pattern for each in (self.fields[0].open, self.fields[0].close) if each is not None]
        texts = list(map(_unescaped, patterns))
        is_literal = list(map(re.escape, texts)) == patterns
        return (texts[0], texts[1]) if is_literal and len(texts) == 2 else None

    def to_json(self) -> dict[str, Any]:
        """The markers as metadata hold them."""
        field = next(each for each in self.fields if each.kind == "thinking")
        close = {} if field.close is None else {"close": _readable(field.close)}
        return {"markers": self.source, "open": _readable(field.open), **close}

    def last_in(self, opening: str) -> tuple[int, int]:
        """Where the last opening and the last closing marker of thinking end; -1 without one."""
        fields = [each for each in self.fields if each.kind == "thinking"]
        opened = [match.end() for each in fields for match in each.open.finditer(opening)]
        closed = [match.end() for each in fields if each.close for match in each.close.finditer(opening)]
        return max(opened, default=-1), max(closed, default=-1)

    def _start(self, opening: str) -> int:
        """Where the response begins in the end of the prompt."""
        return max((match.end() for match in self.anchor.finditer(opening)), default=0) if self.anchor else 0

    def _parts(self, opening: str, response: str) -> Iterator[_Part]:
        """All parts of the end of a prompt and the response, as runs of their characters together."""
        text, at, after_marker = opening + response, self._start(opening), False
        while True:
            opens = list(self._opens(text, at, len(opening)))
            first = min(opens, key=lambda each: (each[1].start(), -len(each[1][0])), default=None)
            stop = len(text) if first is None else first[1].start()
            for begin, end in self._unmarked(text, at, stop):
                yield _Part(self.rest, begin, end, after_marker or begin > at, end < len(text))
            if first is None:
                return
            field, match = first
            close = None if field.close is None else field.close.search(text, match.end())
            end = len(text) if close is None else close.start()
            yield _Part(field.kind, match.end(), end, after_marker=True, before_marker=close is not None)
            if close is None:
                return
            at, after_marker = max(close.end(), match.end()), True

    def _opens(self, text: str, at: int, n_before: int) -> Iterator[tuple[Field, Any]]:
        for field in self.fields:
            match = field.open.search(text, at)
            # The table is a guess: an answer may mention such a marker.
            is_certain = self.source != TABLE or field.kind == "answer"
            if match and match[0] and (is_certain or not text[n_before : match.start()].strip()):
                yield field, match

    def _unmarked(self, text: str, at: int, stop: int) -> Iterator[tuple[int, int]]:
        for match in self.rest_end.finditer(text, at, stop) if self.rest_end is not None else ():
            if match[0]:
                yield at, match.start()
                at = match.end()
        yield at, stop


def literal(kind: Literal["thinking", "answer"], opening: str, *closing: str) -> Field:
    """The part between an opening marker and the first of the closing ones, or the end of the response."""
    close = re.compile("|".join(map(re.escape, closing))) if closing else None
    return Field(kind, re.compile(re.escape(opening)), close)


def channels(source: str) -> ThinkingMarkers:
    """gpt-oss's harmony format: the channel `analysis` is thinking, all others are the answer."""
    message = re.compile(r"<\|channel\|>[^\n]*?<\|message\|>")
    return ThinkingMarkers(
        source,
        (
            literal("thinking", "<|channel|>analysis<|message|>", "<|end|>"),
            Field("answer", message, re.compile(r"<\|(?:end|return|call)\|>")),
        ),
        rest="template",
    )


_RESPONSES = (
    literal("answer", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    # Granite 3.3's system prompt asks for these tags; an answer may have them elsewhere, as part of its text.
    Field("answer", re.compile(r"(?<=</think>)\s*<response>"), re.compile(r"</response>")),
)
_IN_WORDS = Field(  # Granite 3.2, whose system prompt asks for these words
    "thinking", re.compile(r"Here(?:'s| is) my thought process:"), re.compile(r"Here(?:'s| is) my response:")
)
MARKERS_OF_MODELS = (
    channels(TABLE),
    ThinkingMarkers(TABLE, (_IN_WORDS,)),
    *(ThinkingMarkers(TABLE, (literal("thinking", *tags), *_RESPONSES)) for tags in THINKING_TAGS),
)


def _unescaped(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern)


def _readable(pattern: Any) -> str:
    return str(pattern.pattern) if "\\n" in pattern.pattern else _unescaped(pattern.pattern)
