"""Texts that end a response with the token that completes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MARGIN = 8  # tokens: parts of a character have no text of their own


class StopTexts:
    """Looks for texts at the end of responses, across the boundaries of tokens, special tokens included.

    Args:
        tokenizer: the tokenizer of the responses.
        texts: the texts, none of them empty.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self._tokenizer = tokenizer
        self._texts = texts
        self._n_tokens = max(len(text.encode()) for text in texts) + _MARGIN  # a token has at least one byte

    def is_completed(self, last_of_prompt: int, response: Sequence[int]) -> bool:
        """Whether one of the texts occurs in the last tokens of a response."""
        ids = [last_of_prompt, *response][-self._n_tokens - 1 :]
        # Decoders drop a space before the first token, which is not looked at.
        end = self._decoded(ids).removeprefix(self._decoded(ids[:1]))
        return any(text in end for text in self._texts)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
