"""Tracks, token by token, which rows of a batch are within their thinking.

A token is thinking if the thinking was open before it and still is after it: the tokens that complete the opening and
the closing marker are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from tlcapture.models.streams import upload
from tlcapture.prompts.thinking import is_thinking, marker_tokens
from tlcapture.prompts.tokenization import token_texts
from tlcapture.shapes import NextTokens, Rows
from tlcapture.text import MOST_BYTES, REPLACEMENT


@runtime_checkable
class ThinkingRows(Protocol):
    """The rows of a batch, and whether each is within its thinking."""

    def read(self, tokens: NextTokens) -> Rows:
        """Whether the next token of each row is thinking, on the device of the tokens."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""


def thinking_rows(
    tokenizer: Any, openings: Sequence[str], responses: Sequence[Sequence[int]], templated: Sequence[bool]
) -> ThinkingRows:
    """The rows after their responses so far. Markers of one token are matched on the device, others by their text.

    `templated` says whether the chat template rendered the prompt of each row.
    """
    texts = [_Text.of(tokenizer, *row) for row in zip(openings, responses, templated, strict=True)]
    are_alike = len(set(templated)) == 1
    markers = marker_tokens(tokenizer, chat_template=templated[0]) if are_alike else None
    return _ByText(texts) if markers is None else _ByToken(*markers, [each.is_open for each in texts])


def thinking_tokens(tokenizer: Any, opening: str, response: Sequence[int], *, chat_template: bool = True) -> list[bool]:
    """Whether each token of a response is thinking."""
    text = _Text.of(tokenizer, opening, (), chat_template)
    return [text.append(token) for token in response]


class _ByToken:
    """Tracks rows on the device, by the ids of the markers."""

    def __init__(self, open: int, close: int, inside: Sequence[bool]):
        self._open, self._close = open, close
        self._inside = torch.tensor(list(inside))

    def read(self, tokens: NextTokens) -> Rows:
        inside = self._inside.to(tokens.device) & (tokens != self._close)
        self._inside = inside | (tokens == self._open)
        return inside

    def keep(self, rows: Sequence[int]) -> None:
        self._inside = self._inside.index_select(0, upload(rows, self._inside.device))


class _ByText:
    """Tracks rows in main memory, which makes every step wait."""

    def __init__(self, texts: Sequence[_Text]):
        self._texts = list(texts)

    def read(self, tokens: NextTokens) -> Rows:
        inside = [text.append(token) for text, token in zip(self._texts, tokens.tolist(), strict=True)]
        return torch.tensor(inside, device=tokens.device)

    def keep(self, rows: Sequence[int]) -> None:
        self._texts = [self._texts[row] for row in rows]


class _Text:
    """The text of a response so far, and whether its thinking is open."""

    def __init__(self, tokenizer: Any, opening: str, chat_template: bool):
        self._tokenizer, self._opening, self._chat_template = tokenizer, opening, chat_template
        self._text, self._parts = "", list[int]()  # whole characters, and tokens after them that are parts of one
        self.is_open = self._is_open("")

    @classmethod
    def of(cls, tokenizer: Any, opening: str, response: Sequence[int], chat_template: bool) -> _Text:
        text = cls(tokenizer, opening, chat_template)
        for token in response:
            text.append(token)
        return text

    def append(self, token: int) -> bool:
        """Read a token; returns whether it is thinking."""
        self._parts.append(token)
        if len(self._parts) == 1:
            piece = token_texts(self._tokenizer, [token])[0]
        else:
            piece = str(self._tokenizer.decode(self._parts, clean_up_tokenization_spaces=False))
        if not piece.endswith(REPLACEMENT) or len(self._parts) == MOST_BYTES:
            self._text, self._parts, piece = self._text + piece, [], ""
        before, self.is_open = self.is_open, self._is_open(self._text + piece)
        return before and self.is_open

    def _is_open(self, text: str) -> bool:
        return is_thinking(self._tokenizer, self._opening, text, chat_template=self._chat_template)
