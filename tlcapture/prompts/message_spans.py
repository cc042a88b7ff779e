"""Where the text of each message is in a rendered conversation.

A text such as `user` may also occur in what the template itself writes, so that looking for it is not enough:

1. Pieces (`_pieces`). Each message is a piece of text, without white space at its ends. An assistant message is cut at
   its thinking tags, which templates write in their own way, or leave out with the thinking.
2. Marks (`_places`). The conversation is rendered again with a mark in every piece. If this rendering without its marks
   is the first one, the marks show where the pieces are. A mark is a private-use character somewhere in the text, or
   another letter in place of its own, for templates that read a text's length.
3. Turns (`_places_in_turn`). A template may write a text in a title or a reminder, too. The conversation is then
   rendered with further turns after or before it: what is in a turn keeps all that is before or after it. The system
   message has no further turns of its own.
4. Order (`find_messages`). From the last to the first, each piece gets its place, which ends before the next one's
   begins; that of a system message may be anywhere. A piece without a place is thinking that was dropped, or the result
   of a tool that is encoded (`_encoded`), whose place is what changes with it; otherwise its message is missing. Of
   several places none is taken.
5. Spans (`_span`). A message's span holds all its pieces, and the white space at its ends that the rendering keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
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
_MARKED_AT = (1 / 2, 1 / 4, 3 / 4, 1)  # of a text's length: a word there, such as /no_think, may be read
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
            message without text, and for a system message that is in several places.
        dropped: indices of earlier assistant messages whose thinking is left out.
        missing: the index of a message whose text is altered or left out, the last one if there are several.
        unclear: the index of another message whose text is in several places, any of which may be its turn.
    """

    spans: tuple[Span | None, ...]
    dropped: tuple[int, ...] = ()
    missing: int | None = None
    unclear: int | None = None


@dataclass(frozen=True)
class _Piece:
    """Text of a message without white space at its ends: a whole message, or what is between its thinking tags."""

    message: int
    start: int  # in the message's content
    text: str
    can_be_dropped: bool


_Render = Callable[[Sequence[Message]], str | None]


class _Unmarked(NamedTuple):
    """A rendering without its marks, and where each piece may start in it; it may be altered there."""

    text: str
    places: list[list[int]]


@dataclass(frozen=True)
class _Marking:
    """Marks for pieces, one each: put in at a share of the text's length, or in place of its letters (`None`)."""

    pieces: Sequence[_Piece]
    marks: Sequence[str]
    share: float | None

    def put_into(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their pieces marked."""
        contents = [message["content"] for message in messages]
        for piece, mark in reversed(list(zip(self.pieces, self.marks, strict=True))):
            content, stop = contents[piece.message], piece.start + len(piece.text)
            contents[piece.message] = content[: piece.start] + self._marked(piece, mark) + content[stop:]
        return [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]

    def taken_from(self, rendering: str) -> _Unmarked:
        """A rendering of marked messages without the marks."""
        return self._letters_restored(rendering) if self.share is None else self._marks_removed(rendering)

    def _marked(self, piece: _Piece, mark: str) -> str:
        if self.share is not None:
            cut = self._cut(piece, self.share)
            return piece.text[:cut] + mark + piece.text[cut:]
        # A template may read the punctuation; a text of nothing else is replaced as well.
        is_letter = str.isalnum if any(map(str.isalnum, piece.text)) else str.strip
        return "".join(mark if is_letter(each) else each for each in piece.text)

    def _cut(self, piece: _Piece, share: float) -> int:
        """Where a mark goes in a piece: not within a tag, which a template may read."""
        return len(piece.text) if _THINKING_TAG.search(piece.text) else int(share * len(piece.text))

    def _letters_restored(self, rendering: str) -> _Unmarked:
        text, places = rendering, []
        for piece, mark in zip(self.pieces, self.marks, strict=True):
            marked = self._marked(piece, mark)
            places.append([match.start() for match in re.finditer(re.escape(marked), text)])
            text = text.replace(marked, piece.text)
        return _Unmarked(text, places)

    def _marks_removed(self, rendering: str) -> _Unmarked:
        assert self.share is not None
        places: dict[str, list[int]] = {mark: [] for mark in self.marks}
        unmarked: list[str] = []
        for character in rendering:
            if character in places:
                places[character].append(len(unmarked))
            else:
                unmarked.append(character)
        starts = []
        for piece, mark in zip(self.pieces, self.marks, strict=True):
            cut = self._cut(piece, self.share)
            starts.append([max(0, at - cut) for at in places[mark]])
        return _Unmarked("".join(unmarked), starts)


def find_messages(text: str, messages: Sequence[Message], render: _Render) -> FoundMessages:
    """Find the messages that `text` is the rendering of; `render` renders others, and returns `None` if it fails.

    User and assistant messages have to be in order. A system message may be anywhere: some templates put it in front
    of the last user message.
    """
    pieces = [piece for index in range(len(messages)) for piece in _pieces(messages, index)]
    places = _places(text, messages, pieces, render)
    placed: dict[_Piece, int] = {}
    encoded: dict[int, Span] = {}
    dropped: set[int] = set()
    limit = len(text)  # where the following piece begins
    for piece, options in reversed(list(zip(pieces, places, strict=True))):
        is_system = messages[piece.message]["role"] == "system"
        if len(options) > 1:
            if is_system:
                continue
            return FoundMessages((), unclear=piece.message)
        is_free = not any(_overlap(piece, start, *each) for start in options for each in placed.items())
        if options and is_free and (is_system or options[0] + len(piece.text) <= limit):
            placed[piece] = options[0]
            limit = limit if is_system else options[0]
        elif piece.can_be_dropped:
            dropped.add(piece.message)
        else:
            span = _encoded(text, messages, piece.message, render)
            if span is None or span.stop > limit:
                return FoundMessages((), missing=piece.message)
            encoded[piece.message], limit = span, span.start
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


def _places(text: str, messages: Sequence[Message], pieces: Sequence[_Piece], render: _Render) -> list[list[int]]:
    """Where each piece starts in its turn: one place, none, or several of which any may be it."""
    for share in (*_MARKED_AT, None):
        among = _LETTERS if share is None else _PRIVATE_USE
        marks = _unused_characters(text + "".join(piece.text for piece in pieces), len(pieces), among)
        marking = _Marking(pieces, marks, share)
        marked = marking.put_into(messages)
        found = marking.taken_from(render(marked) or "")
        if found.text == text:
            break
    else:
        return [[] for _ in pieces]
    places = [
        [at for at in options if len(options) > 1 or text.startswith(piece.text, at)]
        for piece, options in zip(pieces, found.places, strict=True)
    ]
    repeated = [
        number
        for number, piece in enumerate(pieces)
        if len(places[number]) > 1 and messages[piece.message]["role"] != "system"
    ]
    if repeated:
        after, before = (marking.taken_from(render(each) or "") for each in _longer(messages, marked))
        for number in repeated:
            places[number] = _places_in_turn(number, pieces[number], found, after, before)
    return places


def _longer(messages: Sequence[Message], marked: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The marked messages with the last turns, unmarked, once more after them, and with the first ones before them."""
    users = [number for number, each in enumerate(messages) if each["role"] == "user"]
    first = next((number for number, each in enumerate(messages) if each["role"] != "system"), len(messages))
    last = users[-1] if users else first
    second = next((number for number in users if number > first), len(messages))

    def answered(turns: Sequence[Message]) -> list[Message]:
        answer = [] if turns and turns[-1]["role"] == "assistant" else [{"role": "assistant", "content": "-"}]
        return [*turns, *answer]

    after = [*answered(marked), *messages[last:]]
    before = [*marked[:first], *answered(messages[first:second]), *marked[first:]]
    return after, before


def _places_in_turn(number: int, piece: _Piece, found: _Unmarked, after: _Unmarked, before: _Unmarked) -> list[int]:
    """Of the places of a piece, the one that keeps most of the text around it in longer conversations.

    `after` and `before` are the renderings with further turns there. The first place is taken of several within a turn;
    all are returned where none is the turn's.
    """
    text, places = found.text, found.places[number]
    backwards, in_after = text[::-1], after.text[::-1]

    def shared_around(at: int) -> tuple[float, float]:
        """How far the text on the left and on the right is the same."""
        left = (_shared(backwards[len(text) - at :], in_after[len(in_after) - to :]) for to in after.places[number])
        right = (_shared(text[at:], before.text[to:]) for to in before.places[number])
        return max((n - at for n in left), default=-inf), max((n + at for n in right), default=-inf)

    def is_echo(at: int, later: int) -> bool:
        """Whether a place is in the same turn as another one: they stay together in both conversations."""
        between = text[at:later]
        return all(
            any(
                to + len(between) in each.places[number] and each.text.startswith(between, to)
                for to in each.places[number]
            )
            for each in (after, before)
        )

    most = tuple(map(max, zip(*map(shared_around, places), strict=True)))
    best = [at for at in places if min(most) > -inf and shared_around(at) == most]
    if not best or not all(is_echo(best[0], at) for at in best[1:]):
        return places
    turn = [at for at in places if at in best or (at < best[0] and is_echo(at, best[0]))]
    return [at for at in turn if text.startswith(piece.text, at)][:1]


def _shared(one: str, other: str) -> float:
    """How many characters at the beginning two texts share; minus infinity for a few, unless the texts are equal."""
    n = n_shared(one, other)
    return n if n > _BY_CHANCE or one == other else -inf


def _overlap(one: _Piece, start: int, other: _Piece, placed_at: int) -> bool:
    return start < placed_at + len(other.text) and placed_at < start + len(one.text)


def _encoded(text: str, messages: Sequence[Message], index: int, render: _Render) -> Span | None:
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
