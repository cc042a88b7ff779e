"""From a prompt to token ids with one BOS, and from token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tlcapture.errors import InputError
from tlcapture.prompts.chat_template import RenderedChat, render_chat, uses_chat_template

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
        merged, dropped: what the chat template merged or left out, see `RenderedChat`.
    """

    prompt_set: str
    id: str
    source_text: str
    text: str
    token_ids: tuple[int, ...]
    system_prompt: str | None
    chat_template: bool
    merged: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlacedResponse:
    """A prompt and a given response to it as the model reads them, up to the end of the response.

    Attributes:
        token_ids: ids of prompt and response, tokenised in one piece.
        start: the index of the response's first token.
        chat_template, merged, dropped: see `TokenizedPrompt`.
    """

    token_ids: tuple[int, ...]
    start: int
    chat_template: bool
    merged: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def tokenize(
    tokenizer: Any,
    text: str,
    *,
    prompt_set: str,
    prompt_id: str,
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
        chat = render_chat(tokenizer, _conversation(text, system_prompt))
        ids = list(tokenizer(chat.text, add_special_tokens=False)["input_ids"])
    else:
        chat = RenderedChat(_plain(text, system_prompt), ())
        ids = encode(tokenizer, chat.text)
    if not ids:
        raise InputError(f"{name}: its text has no tokens")
    return TokenizedPrompt(
        prompt_set, prompt_id, text, chat.text, tuple(ids), system_prompt, templated, chat.merged, chat.dropped
    )


def place_response(
    tokenizer: Any,
    prompt: str,
    response: str,
    *,
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    separator: str = "",
) -> PlacedResponse:
    """Tokenise a prompt with a response that is given rather than generated.

    With a chat template this is the rendering of the whole conversation, cut at the end of the response. It may differ
    from the prompt of `tokenize` and the response after it: some templates open a thinking block for generation, or
    write an empty one before an answer. Without a template, `separator` is put between prompt and response.

    Raises:
        InputError: the chat template rejects the conversation.
    """
    templated = uses_chat_template(tokenizer, chat_template)
    if not templated:
        before = f"{_plain(prompt, system_prompt)}{separator}"
        whole = encode(tokenizer, before + response)
        bare, start = _tokens_from(tokenizer, before + response, len(before))
        return PlacedResponse(tuple(whole), len(whole) - len(bare) + start, templated)
    messages = [*_conversation(prompt, system_prompt), {"role": "assistant", "content": response}]
    chat = render_chat(tokenizer, messages, add_generation_prompt=False)
    span = chat.spans[-1]
    if span is None:
        raise InputError("the response is empty")
    ids, start = _tokens_from(tokenizer, chat.text[: span.stop], span.start)
    return PlacedResponse(tuple(ids), start, templated, chat.merged, chat.dropped)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a plain text with exactly one BOS if the tokenizer has a BOS token.

    Other special tokens that the tokenizer puts in front stay; what it appends, such as EOS, does not.
    """
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    n_before = next((n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare), 0)
    before, bos = whole[:n_before], tokenizer.bos_token_id
    if bos is not None and before[-1:] == bare[:1] == [bos]:  # the text itself starts with a BOS
        before = before[:-1]
    ids = [*before, *bare]
    return ids if bos in before else with_bos(tokenizer, ids)


def with_bos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """`ids` with the tokenizer's BOS in front; unchanged if they start with it or the tokenizer has none."""
    bos = tokenizer.bos_token_id
    return list(ids) if bos is None or list(ids[:1]) == [bos] else [bos, *ids]


def unknown_token(tokenizer: Any, ids: Sequence[int], d_vocab: int) -> str | None:
    """Why a model with an embedding of `d_vocab` rows cannot read token ids; `None` if it can."""
    unknown = next((i for i in ids if i >= d_vocab), None)
    if unknown is None:
        return None
    return (
        f"token {tokenizer.convert_ids_to_tokens(unknown)!r} has the id {unknown}, but the model's embedding has "
        f"{d_vocab} rows: leave it out, or resize the embedding"
    )


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


def _conversation(text: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]


def _plain(text: str, system_prompt: str | None) -> str:
    return f"{system_prompt}\n\n{text}" if system_prompt else text


def _tokens_from(tokenizer: Any, text: str, start: int) -> tuple[list[int], int]:
    """The ids of a text without added special tokens, and the index of the first token beyond character `start`."""
    if not getattr(tokenizer, "is_fast", False):  # has no offsets
        ids, before = (list(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (text, text[:start]))
        pairs = zip(ids, before, strict=False)
        return ids, next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(before)))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    return ids, next((n for n, (_, stop) in enumerate(found["offset_mapping"]) if stop > start), len(ids))


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: its text or system prompt is not valid Unicode") from None
