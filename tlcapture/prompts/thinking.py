"""Where the thinking of a response ends and its answer begins. Loads no torch.

Markers of thinking are taken from the tokenizer's `response_template` (which transformers' `parse_response` reads),
else from how the chat template renders an assistant message with `reasoning_content`, else from the table
`MARKERS_OF_MODELS`. The end of the prompt matters too, since some templates open the thinking there, or close it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from tlcapture.prompts.chat_template import SWITCHES, rendered_or_none
from tlcapture.prompts.spans import TextSpan, TokenSpan, spans_of_text
from tlcapture.prompts.thinking_markers import MARKERS_OF_MODELS, TAG, Field, ThinkingMarkers, channels, literal
from tlcapture.text import MOST_BYTES, REPLACEMENT, n_shared

RESPONSE_TEMPLATE, REASONING_CONTENT = "response_template", "reasoning_content"  # the sources of markers

_QUESTION, _THOUGHT, _ANSWER = "tlcapture question", "tlcapture thought", "tlcapture answer"
_FIELDS_OF_THINKING = ("thinking", "reasoning_content", "reasoning")

# By tokenizer and name: what was found out, and the templates that it was found in, which may be replaced.
_known: WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


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
        is_switched = _once(tokenizer, "closes if off", tokenizer.chat_template, _closes_if_off)
        return bool(is_switched) or _asks_for_thinking(instructions)
    return markers.thinks(opening)


def thinking_markers(tokenizer: Any, *, chat_template: bool = True) -> ThinkingMarkers | None:
    """The markers that a tokenizer reveals; `None` if only the table is left.

    The chat template is only rendered if prompts are rendered with it.
    """
    template = getattr(tokenizer, "chat_template", None) if chat_template else None

    templates = (template, getattr(tokenizer, "response_template", None))
    find = (_of_response_template, _of_rendering) if template else (_of_response_template,)
    found: ThinkingMarkers | None = _once(tokenizer, "markers", templates, *find)
    return found


def _once(tokenizer: Any, name: str, templates: Any, *find: Callable[[Any], Any]) -> Any:
    """What the first of these functions finds; they are called once as long as a tokenizer has these templates."""
    known = _known.setdefault(tokenizer, {})
    if name not in known or known[name][0] != templates:
        known[name] = templates, next(filter(None, (each(tokenizer) for each in find)), None)
    return known[name][1]


def _table_entry(opening: str, response: str) -> ThinkingMarkers | None:
    """The entry of the table whose thinking is open at the end of the prompt, or with which the response begins."""
    for entry in MARKERS_OF_MODELS:
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
        Field("thinking" if name in _FIELDS_OF_THINKING else "answer", field.open_re, field.close_re)
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
            opened, closed = found.last_in(prompt[prompt.rfind(_QUESTION) :]) if found else (-1, -1)
            return found and replace(found, opened_by_prompt=opened > closed)
    return None


def _closes_if_off(tokenizer: Any) -> bool:
    """Whether the end of a prompt closes the thinking where it is switched off, and is thus expected otherwise."""
    off = dict.fromkeys(SWITCHES, False)
    user = {"role": "user", "content": _QUESTION}
    prompt = rendered_or_none(tokenizer, [user], add_generation_prompt=True, template_args=off)
    opening = (prompt or "").rpartition(_QUESTION)[2]
    entry = _table_entry(opening, "")
    return entry is not None and not entry.thinks(opening)


def _asks_for_thinking(instructions: str) -> bool:
    """Whether a text names the markers around the thinking, as the system prompts of Granite 3.3 and Phi-4 do."""
    fields = [entry.fields[0] for entry in MARKERS_OF_MODELS]
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
        return channels(REASONING_CONTENT)
    before = _start_of_tag(whole, n_shared(whole[:thought], prompt))
    asked = whole.rfind(_QUESTION, 0, thought) + len(_QUESTION)
    opening = whole[before:thought].strip() or _opener(whole[asked:thought], whole[asked:])
    closing = whole[thought + len(_THOUGHT) : answer]
    tag = TAG.search(closing)
    end = len(closing.rstrip()) if tag is None else tag.end()
    close = closing[:end].strip()
    if not opening or not close:
        return None
    header = prompt[n_shared(prompt, bare) :].strip()
    following = closing[end:].strip().removeprefix(header).strip()
    if not following:
        return ThinkingMarkers(REASONING_CONTENT, (literal("thinking", opening, close),))
    after = TAG.search(whole, answer + len(_ANSWER))
    ends = [close, *([after[0]] if after else [])]
    fields = (literal("thinking", opening, close), literal("answer", following, *ends))
    return ThinkingMarkers(REASONING_CONTENT, fields, rest="template")


def _start_of_tag(text: str, at: int) -> int:
    """The start of the tag that `at` is within; `at` itself if it is in none."""
    return next((match.start() for match in TAG.finditer(text) if match.start() < at < match.end()), at)


def _opener(text: str, turns: str) -> str:
    """What the prompt itself writes before a thought: the last tags, as many as occur once in `turns`, or a line."""
    text = text.rstrip()
    tags = list(TAG.finditer(text))
    if not tags or tags[-1].end() < len(text):
        return text.rpartition("\n")[2].strip()
    ends = [text[tag.start() :] for tag in reversed(tags)]
    return next((each for each in ends if turns.count(each) == 1), ends[0])
