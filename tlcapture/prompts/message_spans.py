"""Where the text of each message is in a rendered conversation.

A text such as `user` may also occur in what the template itself writes. The conversation is therefore rendered once
more with a mark, a private-use character, in every text: where the two renderings are otherwise equal, the marks show
where the texts are. A template that depends on more than the first and last characters of a text may render it
differently with a mark; its texts are then searched for, and only count as found where they go when other letters
take the place of theirs. A tool's result may be encoded: its span is what changes with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from tlcapture.text import n_shared

Message = Mapping[str, Any]  # role and content, and further keys that a template may read

# What models write around their thinking.
THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|thought_start|>", "<|thought_end|>"),
)
_THINKING_TAG = re.compile("|".join(re.escape(tag) for tags in THINKING_TAGS for tag in tags))
_MARKED_AT = (1 / 2, 1 / 4, 3 / 4)  # of a text's length
_AROUND = 12  # characters before a text by which a turn is known again
_BY_CHANCE = 4  # characters that a turn and a title may have in common, such as `er: `
_PRIVATE_USE = range(0xF0000, 0x10FFFE)
_LETTERS = range(0x20000, 0x2A6E0)  # of CJK Extension B, which no template writes and `repr` leaves as they are


class Span(NamedTuple):
    """A run of characters of a rendering."""

    start: int
    stop: int


@dataclass(frozen=True)
class FoundMessages:
    """Where messages are in a rendering.

    Attributes:
        spans: the span of each message, with the white space at its ends where the rendering keeps that; `None` for a
            message without text.
        dropped: indices of earlier assistant messages whose thinking is left out.
        missing: the index of a message whose text is altered or left out, the last one if there are several.
    """

    spans: tuple[Span | None, ...]
    dropped: tuple[int, ...] = ()
    missing: int | None = None


@dataclass(frozen=True)
class _Piece:
    """Text of a message without white space at its ends: a whole message, or what is between its thinking tags."""

    message: int
    start: int  # in the message's content
    text: str
    can_be_dropped: bool


def find_messages(
    text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str | None]
) -> FoundMessages:
    """Find the messages that `text` is the rendering of; `render` renders others, and returns `None` if it fails.

    User and assistant messages have to be in order. A system message may be anywhere: some templates put it in front
    of the last user message.
    """
    pieces = [piece for index in range(len(messages)) for piece in _pieces(messages, index)]
    by_mark = (_marked_starts(text, messages, pieces, share, render) for share in _MARKED_AT)
    starts = next((each for each in by_mark if each is not None), None)
    if starts is None:
        starts = _searched_starts(text, messages, pieces, render)
    elif any(len(each) > 1 for each in starts):
        starts = _in_turns(text, messages, pieces, starts, render)
    placed: dict[_Piece, int] = {}
    encoded: dict[int, Span] = {}
    dropped: set[int] = set()
    limit = len(text)
    for piece, options in reversed(list(zip(pieces, starts, strict=True))):
        options = [start for start in options if not any(_overlap(piece, start, *each) for each in placed.items())]
        before = [start for start in options if start + len(piece.text) <= limit]
        is_system = messages[piece.message]["role"] == "system"
        if not before and not (is_system and options):
            if not piece.can_be_dropped:
                span = _encoded(text, messages, piece.message, render)
                if span is None or span.stop > limit:
                    return FoundMessages((), missing=piece.message)
                encoded[piece.message], limit = span, span.start
                continue
            dropped.add(piece.message)
            continue
        placed[piece] = (before or options)[-1]
        if not is_system:
            limit = placed[piece]
    kept = {piece: at for piece, at in placed.items() if not (piece.can_be_dropped and piece.message in dropped)}
    spans = tuple(encoded.get(index) or _span(text, index, message, kept) for index, message in enumerate(messages))
    return FoundMessages(spans, tuple(sorted(dropped)))


def _pieces(messages: Sequence[Message], index: int) -> list[_Piece]:
    """The pieces of a message. Templates write thinking tags, and the white space around them, in their own way."""
    content, role = messages[index]["content"], messages[index]["role"]
    tags = list(_THINKING_TAG.finditer(content)) if role == "assistant" else []
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(content)]
    thinking_ends = tags[-1].start() if tags and index < len(messages) - 1 else 0
    found = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        part = content[start:stop]
        if part.strip():
            start += len(part) - len(part.lstrip())
            found.append(_Piece(index, start, part.strip(), can_be_dropped=start < thinking_ends))
    if tags and not found:  # a text such as `<think>` alone, which begins a response
        found.append(_Piece(index, tags[0].start(), content.strip(), can_be_dropped=index < len(messages) - 1))
    return found


def _marked_starts(
    text: str,
    messages: Sequence[Message],
    pieces: Sequence[_Piece],
    share: float,
    render: Callable[[Sequence[Message]], str | None],
) -> list[list[int]] | None:
    """Where each piece starts in `text`; `None` if a mark at this share of its length changes the rendering."""
    marks = _unused_characters(text, len(pieces))
    cuts = [_cut(piece, share) for piece in pieces]
    contents = [message["content"] for message in messages]
    for piece, cut, mark in reversed(list(zip(pieces, cuts, marks, strict=True))):
        content, at = contents[piece.message], piece.start + cut
        contents[piece.message] = content[:at] + mark + content[at:]
    marked = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
    found: dict[str, list[int]] = {mark: [] for mark in marks}
    unmarked: list[str] = []
    for character in render(marked) or "":
        if character in found:
            found[character].append(len(unmarked))
        else:
            unmarked.append(character)
    if "".join(unmarked) != text:
        return None
    return [
        [at - cut for at in found[mark] if at >= cut and text.startswith(piece.text, at - cut)]
        for piece, cut, mark in zip(pieces, cuts, marks, strict=True)
    ]


def _cut(piece: _Piece, share: float) -> int:
    """Where a mark goes in a piece: not within a tag, which a template may read."""
    return len(piece.text) if _THINKING_TAG.search(piece.text) else int(share * len(piece.text))


def _searched_starts(
    text: str,
    messages: Sequence[Message],
    pieces: Sequence[_Piece],
    render: Callable[[Sequence[Message]], str | None],
) -> list[list[int]]:
    """Where each piece occurs in `text`; nowhere, if that is what the template itself writes.

    With other letters in all messages, as many occurrences of a text have to be gone as there are pieces of it.
    """
    letter = _unused_characters(text + "".join(piece.text for piece in pieces), 1, _LETTERS)[0]
    contents = [message["content"] for message in messages]
    for piece in pieces:
        start, stop = piece.start, piece.start + len(piece.text)
        changed = "".join(letter if each.isalnum() else each for each in piece.text)
        contents[piece.message] = contents[piece.message][:start] + changed + contents[piece.message][stop:]
    others = render([{**message, "content": content} for message, content in zip(messages, contents, strict=True)])
    needed = Counter(piece.text for piece in pieces if not piece.can_be_dropped)
    found = []
    for piece in pieces:
        starts = [match.start() for match in re.finditer(re.escape(piece.text), text)]
        has_letters = any(map(str.isalnum, piece.text))
        n_gone = len(starts) if others is None or not has_letters else len(starts) - others.count(piece.text)
        found.append(starts if n_gone >= needed[piece.text] else [])
    return found


def _in_turns(
    text: str,
    messages: Sequence[Message],
    pieces: Sequence[_Piece],
    starts: list[list[int]],
    render: Callable[[Sequence[Message]], str | None],
) -> list[list[int]]:
    """Of several places of a piece, the one in its turn: a template may write a text in a title or a reminder, too.

    With further turns after or before the conversation, a title or a reminder holds the text of another message, and
    what is in the turn is still behind the same text. Of several places in a turn it is the first one.
    """
    marks = _unused_characters(text, len(pieces))
    contents = [message["content"] for message in messages]
    for piece, mark in reversed(list(zip(pieces, marks, strict=True))):
        at = piece.start + _cut(piece, _MARKED_AT[0])
        contents[piece.message] = contents[piece.message][:at] + mark + contents[piece.message][at:]
    marked = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
    turns: list[Message] = [{"role": role, "content": "-"} for role in ("user", "assistant")]
    first = next((n for n, each in enumerate(messages) if each["role"] != "system"), len(messages))
    after = turns if messages[-1]["role"] == "assistant" else turns[::-1]
    longer = [render(each) for each in ([*marked, *after], [*marked[:first], *turns, *marked[first:]])]
    renderings = [each for each in longer if each is not None]
    found = []
    for piece, mark, options in zip(pieces, marks, starts, strict=True):
        is_unclear = len(options) > 1 and renderings and messages[piece.message]["role"] != "system"
        found.append([_in_turn(text, piece, mark, options, renderings, marks)] if is_unclear else options)
    return found


def _in_turn(
    text: str, piece: _Piece, mark: str, options: Sequence[int], renderings: Sequence[str], marks: Sequence[str]
) -> int:
    """The place in its turn of a piece with a mark in renderings of longer conversations."""
    removed = str.maketrans(dict.fromkeys(marks))
    cut = _cut(piece, _MARKED_AT[0])

    def stays(at: int) -> tuple[int, ...]:
        """How many characters before a place are those before the piece in each rendering."""
        before = text[:at][: -_AROUND - 1 : -1]
        numbers = []
        for rendering in renderings:
            others = [rendering[: match.start()].translate(removed) for match in re.finditer(mark, rendering)]
            shared = [n_shared(before, other[: len(other) - cut][: -_AROUND - 1 : -1]) for other in others]
            numbers.append(max([number for number in shared if number > _BY_CHANCE], default=0))
        return (*numbers, at)

    best = max(options, key=stays)
    unmarked = [rendering.translate(removed) for rendering in renderings]
    return next(at for at in options if at == best or (at < best and all(text[at:best] in each for each in unmarked)))


def _overlap(one: _Piece, start: int, other: _Piece, placed_at: int) -> bool:
    return start < placed_at + len(other.text) and placed_at < start + len(one.text)


def _encoded(
    text: str, messages: Sequence[Message], index: int, render: Callable[[Sequence[Message]], str | None]
) -> Span | None:
    """Where the result of a tool is that the template encodes, such as JSON with escapes: what changes with it."""
    if messages[index]["role"] != "tool":
        return None
    mark = _unused_characters(text, 1)[0]
    changed = render([{**each, "content": mark} if n == index else each for n, each in enumerate(messages)])
    before, found, after = (changed or "").partition(mark)
    is_around = text.startswith(before) and text.endswith(after) and len(before) + len(after) < len(text)
    return Span(len(before), len(text) - len(after)) if found and mark not in after and is_around else None


def _unused_characters(text: str, count: int, among: range = _PRIVATE_USE) -> list[str]:
    used = set(text)
    return list(islice((mark for mark in map(chr, among) if mark not in used), count))


def _span(text: str, index: int, message: Message, placed: Mapping[_Piece, int]) -> Span | None:
    own = [(at, at + len(piece.text)) for piece, at in placed.items() if piece.message == index]
    if not own:
        return None
    start, stop, content = min(own)[0], max(own)[1], message["content"]
    before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    if before and text.endswith(before, 0, start):
        start -= len(before)
    return Span(start, stop + len(after) if text.startswith(after, stop) else stop)
