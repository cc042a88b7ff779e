"""Where the thinking of a response ends and its answer begins. Loads no torch.

Markers of thinking are taken from the tokenizer's `response_template` (which transformers' `parse_response` reads),
else from how the chat template renders an assistant message with `reasoning_content`, else from the table below.
The end of the prompt matters too, since some templates open the thinking there, or close it at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from tlcapture.prompts.chat_template import SWITCHES, rendered_or_none
from tlcapture.prompts.message_spans import THINKING_TAGS
from tlcapture.prompts.spans import Kind, TextSpan, TokenSpan, spans_of_text
from tlcapture.text import MOST_BYTES, REPLACEMENT, n_shared

RESPONSE_TEMPLATE, REASONING_CONTENT, TABLE = "response_template", "reasoning_content", "table"

_QUESTION, _THOUGHT, _ANSWER = "tlcapture question", "tlcapture thought", "tlcapture answer"
_FIELDS_OF_THINKING = ("thinking", "reasoning_content", "reasoning")
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷")

# By tokenizer and name: what was found out, and the templates that it was found in, which may be replaced.
_known: WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


class _Field(NamedTuple):
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
    fields: tuple[_Field, ...]
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
        if found or self.rest == "answer" or not stripped or _TAG.match(stripped):
            return found
        # Without any marker, since thinking is off: the answer alone.
        ends = [match.start() for each in self.fields if each.close for match in each.close.finditer(response)]
        return [TextSpan(0, min(ends, default=len(response)), "answer", "assistant")]

    def thinks(self, opening: str) -> bool:
        """Whether a response after this end of a prompt begins with thinking, as far as the template says."""
        opened, closed = self._last(opening)
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
        texts = [re.sub(r"\\(.)", r"\1", pattern) for pattern in patterns]
        is_literal = [re.escape(text) for text in texts] == patterns
        return (texts[0], texts[1]) if is_literal and len(texts) == 2 else None

    def to_json(self) -> dict[str, Any]:
        """The markers as metadata hold them."""
        field = next(each for each in self.fields if each.kind == "thinking")
        close = {} if field.close is None else {"close": _readable(field.close)}
        return {"markers": self.source, "open": _readable(field.open), **close}

    def _last(self, opening: str) -> tuple[int, int]:
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

    def _opens(self, text: str, at: int, n_before: int) -> Iterator[tuple[_Field, Any]]:
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


def _literal(kind: Literal["thinking", "answer"], opening: str, *closing: str) -> _Field:
    close = re.compile("|".join(map(re.escape, closing))) if closing else None
    return _Field(kind, re.compile(re.escape(opening)), close)


def _channels(source: str) -> ThinkingMarkers:
    """gpt-oss's harmony format: the channel `analysis` is thinking, all others are the answer."""
    message = re.compile(r"<\|channel\|>[^\n]*?<\|message\|>")
    return ThinkingMarkers(
        source,
        (
            _literal("thinking", "<|channel|>analysis<|message|>", "<|end|>"),
            _Field("answer", message, re.compile(r"<\|(?:end|return|call)\|>")),
        ),
        rest="template",
    )


_RESPONSES = (
    _literal("answer", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    # Granite 3.3's system prompt asks for these tags; an answer may have them elsewhere, as part of its text.
    _Field("answer", re.compile(r"(?<=</think>)\s*<response>"), re.compile(r"</response>")),
)
_IN_WORDS = _Field(  # Granite 3.2, whose system prompt asks for these words
    "thinking", re.compile(r"Here(?:'s| is) my thought process:"), re.compile(r"Here(?:'s| is) my response:")
)
_TABLE = (
    _channels(TABLE),
    ThinkingMarkers(TABLE, (_IN_WORDS,)),
    *(ThinkingMarkers(TABLE, (_literal("thinking", *tags), *_RESPONSES)) for tags in THINKING_TAGS),
)


def response_spans(
    tokenizer: Any,
    opening: str,
    token_ids: Sequence[int],
    tokens: Sequence[str],
    first: int,
    *,
    stopped: bool,
    chat_template: bool = True,
) -> tuple[list[TokenSpan], dict[str, Any] | None]:
    """The spans of a response, and the markers of thinking as metadata hold them.

    Args:
        opening: see `ThinkingMarkers.text_spans`.
        token_ids, tokens: the response's tokens, and their texts.
        first: the index of its first token.
        stopped: whether the last token is a stop token, which is not part of any text.
        chat_template: whether the prompt was rendered with the chat template; else none is read for markers.

    The markers are `None` if the tokenizer reveals none, and the response has none of the table.
    """
    if not tokens:
        return [], None
    whole, offsets = _with_offsets(tokenizer, token_ids, tokens)
    length = offsets[-1][0] if stopped else len(whole)
    response = whole[:length]
    markers = thinking_markers(tokenizer, chat_template=chat_template) or _table_entry(opening, response)
    parts = [TextSpan(0, length, "answer", "assistant")] if markers is None else markers.text_spans(opening, response)
    spans = spans_of_text([each for each in parts if each.start < each.stop], len(whole), offsets, first)
    return spans, None if markers is None else markers.to_json()


def _with_offsets(tokenizer: Any, token_ids: Sequence[int], tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and the characters of each; tokens that share a character have the same ones."""
    text, offsets, at = "", [], 0
    while at < len(tokens):
        end, piece = at + 1, tokens[at]
        if piece.endswith(REPLACEMENT):
            for end in range(at + 1, min(at + 1 + MOST_BYTES, len(tokens) + 1)):
                piece = str(tokenizer.decode(list(token_ids[at:end]), clean_up_tokenization_spaces=False))
                if not piece.endswith(REPLACEMENT):
                    break
        offsets += [(len(text), len(text) + len(piece))] * (end - at)
        text, at = text + piece, end
    return text, offsets


def is_thinking(tokenizer: Any, opening: str, response: str, *, chat_template: bool = True) -> bool:
    """Whether the thinking goes on at the end of a response so far; arguments are those of `response_spans`."""
    markers = thinking_markers(tokenizer, chat_template=chat_template) or _table_entry(opening, response)
    return markers is not None and markers.is_open(opening, response)


def marker_tokens(tokenizer: Any, *, chat_template: bool = True) -> tuple[int, int] | None:
    """The opening and the closing marker of the thinking as token ids, if each is one token and they alone decide."""
    markers = thinking_markers(tokenizer, chat_template=chat_template)
    literals = None if markers is None else markers.literals()
    if literals is None:
        return None
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in literals]
    return (ids[0][0], ids[1][0]) if [len(each) for each in ids] == [1, 1] else None


def thinks(tokenizer: Any, opening: str, instructions: str = "") -> bool:
    """Whether a response is expected to begin with thinking.

    Args:
        opening: the end of the prompt, see `ThinkingMarkers.text_spans`.
        instructions: its beginning, up to the first message that is not the system's.
    """
    markers = thinking_markers(tokenizer) or _table_entry(opening, "")
    if markers is None:
        return _closes_if_off(tokenizer) or _asks_for_thinking(instructions)
    return markers.thinks(opening)


def thinking_markers(tokenizer: Any, *, chat_template: bool = True) -> ThinkingMarkers | None:
    """The markers that a tokenizer reveals; `None` if only the table is left.

    The chat template is only rendered if prompts are rendered with it.
    """
    template = getattr(tokenizer, "chat_template", None) if chat_template else None

    def find() -> ThinkingMarkers | None:
        return _of_response_template(tokenizer) or (_of_rendering(tokenizer) if template else None)

    found: ThinkingMarkers | None = _once(
        tokenizer, "markers", (template, getattr(tokenizer, "response_template", None)), find
    )
    return found


def _once(tokenizer: Any, name: str, templates: Any, find: Callable[[], Any]) -> Any:
    """What `find` returns, which is called once as long as a tokenizer has these templates."""
    known = _known.setdefault(tokenizer, {})
    if name not in known or known[name][0] != templates:
        known[name] = templates, find()
    return known[name][1]


def _table_entry(opening: str, response: str) -> ThinkingMarkers | None:
    """The entry of the table whose thinking is open at the end of the prompt, or with which the response begins."""
    for entry in _TABLE:
        opens = entry.fields[0].open
        match = opens.search(opening + response)
        if match and not response[: max(0, match.start() - len(opening))].strip():
            return entry
    return None


def _of_response_template(tokenizer: Any) -> ThinkingMarkers | None:
    template = getattr(tokenizer, "response_template", None)
    if not isinstance(template, Mapping):
        return None
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        spec = load_response_template(dict(template))
    except (ImportError, ValueError, TypeError):  # an earlier transformers, or a template of another version
        return None
    fields = [
        _Field("thinking" if name in _FIELDS_OF_THINKING else "answer", field.open_re, field.close_re)
        for name, field in spec.fields.items()
        if field.open_re is not None
    ]
    if not any(field.kind == "thinking" for field in fields):
        return None
    if spec.implicit is None:
        return ThinkingMarkers(RESPONSE_TEMPLATE, tuple(fields), "template", None, spec.start_anchor_re)
    end = spec.fields[spec.implicit].close_re
    return ThinkingMarkers(RESPONSE_TEMPLATE, tuple(fields), "answer", end, spec.start_anchor_re)


def _of_rendering(tokenizer: Any) -> ThinkingMarkers | None:
    """The markers around `reasoning_content` in the chat template's rendering."""
    user = {"role": "user", "content": _QUESTION}
    bare, prompt = (rendered_or_none(tokenizer, [user], add_generation_prompt=each) for each in (False, True))
    for key in ("reasoning_content", "thinking"):
        answer = {"role": "assistant", "content": _ANSWER, key: _THOUGHT}
        whole = rendered_or_none(tokenizer, [user, answer]) or ""
        if whole.count(_THOUGHT) == 1 and whole.find(_ANSWER) > whole.find(_THOUGHT) and prompt is not None:
            found = _between(whole, prompt, bare or "")
            opened, closed = found._last(prompt[prompt.rfind(_QUESTION) :]) if found else (-1, -1)
            return found and replace(found, opened_by_prompt=opened > closed)
    return None


def _closes_if_off(tokenizer: Any) -> bool:
    """Whether the end of a prompt closes the thinking where it is switched off, and is thus expected otherwise."""
    template = getattr(tokenizer, "chat_template", None)

    def find() -> bool:
        user = {"role": "user", "content": _QUESTION}
        off = dict.fromkeys(SWITCHES, False)
        prompt = (
            rendered_or_none(tokenizer, [user], add_generation_prompt=True, template_args=off) if template else None
        )
        opening = (prompt or "").rpartition(_QUESTION)[2]
        entry = _table_entry(opening, "")
        return entry is not None and not entry.thinks(opening)

    return bool(_once(tokenizer, "closes if off", template, find))


def _asks_for_thinking(instructions: str) -> bool:
    """Whether a text names the markers around the thinking, as the system prompts of Granite 3.3 and Phi-4 do."""
    fields = [entry.fields[0] for entry in _TABLE]
    return any(each.open.search(instructions) and each.close.search(instructions) for each in fields if each.close)


def _between(whole: str, prompt: str, bare: str) -> ThinkingMarkers | None:
    """The markers in a rendering of a question, a thought and an answer.

    The opening marker is what is before the thought and not in `prompt`, the question with a generation prompt; where
    that opens the thinking itself, it is the end of that. The closing marker is what is after the thought, up to the
    end of the first tag. What is left before the answer opens the answer, apart from the header that begins any
    response, which `bare`, the question alone, lacks.
    """
    thought, answer = whole.index(_THOUGHT), whole.index(_ANSWER)
    if whole[:thought].endswith("<|channel|>analysis<|message|>"):
        return _channels(REASONING_CONTENT)
    before = _start_of_tag(whole, n_shared(whole[:thought], prompt))
    asked = whole.rfind(_QUESTION, 0, thought) + len(_QUESTION)
    opening = whole[before:thought].strip() or _opener(whole[asked:thought], whole[asked:])
    closing = whole[thought + len(_THOUGHT) : answer]
    tag = _TAG.search(closing)
    end = len(closing.rstrip()) if tag is None else tag.end()
    close = closing[:end].strip()
    if not opening or not close:
        return None
    header = prompt[n_shared(prompt, bare) :].strip()
    following = closing[end:].strip().removeprefix(header).strip()
    if not following:
        return ThinkingMarkers(REASONING_CONTENT, (_literal("thinking", opening, close),))
    after = _TAG.search(whole, answer + len(_ANSWER))
    ends = [close, *([after[0]] if after else [])]
    fields = (_literal("thinking", opening, close), _literal("answer", following, *ends))
    return ThinkingMarkers(REASONING_CONTENT, fields, rest="template")


def _start_of_tag(text: str, at: int) -> int:
    """The start of the tag that `at` is within; `at` itself if it is in none."""
    return next((match.start() for match in _TAG.finditer(text) if match.start() < at < match.end()), at)


def _opener(text: str, turns: str) -> str:
    """What the prompt itself writes before a thought: the last tags, as many as occur once in `turns`, or a line."""
    text = text.rstrip()
    tags = list(_TAG.finditer(text))
    if not tags or tags[-1].end() < len(text):
        return text.rpartition("\n")[2].strip()
    ends = [text[tag.start() :] for tag in reversed(tags)]
    return next((each for each in ends if turns.count(each) == 1), ends[0])


def _readable(pattern: Any) -> str:
    return re.sub(r"\\(.)", r"\1", pattern.pattern) if "\\n" not in pattern.pattern else str(pattern.pattern)
