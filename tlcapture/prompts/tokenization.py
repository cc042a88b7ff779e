"""From a prompt to token ids with one BOS, and from token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tlcapture.errors import InputError
from tlcapture.names import PromptId
from tlcapture.prompts.chat_template import render_chat, uses_chat_template

# Decoded texts by tokenizer and token id: one logit lens needs thousands of them, and the next needs the same ones.
_texts: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model reads it.

    Attributes:
        prompt_set, id: which prompt it is.
        source_text: the text as given.
        text: the rendered text, including the chat template and the system prompt.
        token_ids: ids of the rendered text.
        system_prompt: the system prompt, if any.
        chat_template: whether the chat template was applied.
        fields: further keys of the prompt in its set.
    """

    prompt_set: str
    id: PromptId
    source_text: str
    text: str
    token_ids: tuple[int, ...]
    system_prompt: str | None
    chat_template: bool
    fields: Mapping[str, Any] = field(default_factory=dict)


def tokenize(
    tokenizer: Any,
    text: str,
    *,
    prompt_set: str,
    prompt_id: PromptId,
    system_prompt: str | None = None,
    chat_template: bool | None = None,
) -> TokenizedPrompt:
    """Render and tokenize one prompt.

    With a chat template, the rendered text contains every special token and none is added. Without one, the ids
    start with exactly one BOS if the tokenizer has a BOS token.

    Args:
        chat_template: see `uses_chat_template`.

    Raises:
        InputError: the text is not valid Unicode, has no tokens, or the chat template rejects it.
    """
    name = f"prompt {prompt_set}/{prompt_id}"
    for part in (text, system_prompt or ""):
        _check_unicode(part, name)
    templated = uses_chat_template(tokenizer, chat_template)
    if templated:
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        rendered = render_chat(tokenizer, [*system, {"role": "user", "content": text}])
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        rendered = f"{system_prompt}\n\n{text}" if system_prompt else text
        ids = with_bos(tokenizer, tokenizer(rendered)["input_ids"])
    if not ids:
        raise InputError(f"{name}: its text has no tokens")
    return TokenizedPrompt(prompt_set, prompt_id, text, rendered, tuple(ids), system_prompt, templated)


def with_bos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """`ids` with the tokenizer's BOS in front; unchanged if they start with it or the tokenizer has none."""
    bos = tokenizer.bos_token_id
    return list(ids) if bos is None or list(ids[:1]) == [bos] else [bos, *ids]


def bos_policy(tokenizer: Any, ids: Sequence[int], *, chat_template: bool) -> dict[str, Any]:
    """How many BOS tokens a sequence starts with (`count`), and what added them (`by`).

    `by` is `chat template`, `tlcapture`, or `None` if `count` is 0.
    """
    bos = tokenizer.bos_token_id
    count = 0 if bos is None else next((position for position, i in enumerate(ids) if i != bos), len(ids))
    return {"count": count, "by": ("chat template" if chat_template else "tlcapture") if count else None}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token decoded on its own, including special tokens.

    A token that is part of a character decodes to U+FFFD, so texts cannot be converted back to ids.
    """
    if not ids:
        return []
    table = _texts.setdefault(tokenizer, {})
    new = sorted(set(ids) - table.keys())
    pieces = tokenizer.convert_ids_to_tokens(new)
    texts = tokenizer.batch_decode([[i] for i in new], clean_up_tokenization_spaces=False) if new else []
    for i, piece, text in zip(new, pieces, texts, strict=True):
        # SentencePiece decoders drop the leading space of a word that is decoded on its own.
        starts_word = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
        table[i] = " " + text if starts_word else text
    return [table[i] for i in ids]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a sequence of token ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: its text or system prompt is not valid Unicode") from None
