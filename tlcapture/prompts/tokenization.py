"""From a prompt to token ids with one BOS, and from token ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from tlcapture.errors import InputError
from tlcapture.names import PromptId, capture_name
from tlcapture.prompts.chat_template import ADVICE, NO_ARGS, RenderedChat, render_chat, uses_chat_template
from tlcapture.prompts.conversations import conversation, is_continued
from tlcapture.prompts.known_tokens import KnownTokens
from tlcapture.prompts.message_spans import Message, Span
from tlcapture.prompts.prompt_sets import Prompt
from tlcapture.prompts.spans import (
    NO_OFFSETS,
    NO_TEXT,
    SEVERAL_PLACES,
    Offsets,
    TextSpan,
    TokenSpan,
    spans_of_text,
    unfound,
)
from tlcapture.prompts.thinking import thinks
from tlcapture.text import is_unicode, n_shared

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
        fields: further keys of the prompt in its set.
        messages: the messages of a conversation, as given; empty for a text.
        template_args: values that were given to the chat template.
        spans: which tokens are which turn, and which the template's.
        opening: the end of the rendered text, after the last message that is not the assistant's.
        thinks: whether a response is expected to begin with thinking.
        given: the token ids of a response that is read rather than generated; `None` if one is generated.
        forced: the token ids of a response that is run token by token, as if it were generated; otherwise `None`.
        known: the facts about tokens that come from another capture.
        sample: the number of the response, from 1, among several to the same prompt; `None` if it is the only one.
    """

    prompt_set: str
    id: PromptId
    source_text: str
    text: str
    token_ids: tuple[int, ...]
    system_prompt: str | None
    chat_template: bool
    merged: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    spans: tuple[TokenSpan, ...] = ()
    opening: str = ""
    thinks: bool = False
    given: tuple[int, ...] | None = None
    forced: tuple[int, ...] | None = None
    known: KnownTokens | None = None
    sample: int | None = None

    @property
    def read_ids(self) -> tuple[int, ...]:
        """The tokens to read: the prompt's, and those of a given response."""
        return self.token_ids + (self.given or ())

    @property
    def name(self) -> PromptId:
        """The name of its capture in file names."""
        return capture_name(self.id, self.sample)


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
    prompt_id: PromptId,
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    messages: Sequence[Message] = (),
    template_args: Mapping[str, Any] = NO_ARGS,
) -> TokenizedPrompt:
    """Render and tokenize one prompt.

    With a chat template, the rendered text contains every special token and none is added. Without one, the ids
    start with exactly one BOS if the tokenizer has a BOS token.

    Args:
        system_prompt: the system message; it takes the place of one in `messages`.
        chat_template: see `uses_chat_template`.
        messages: a conversation in place of the text. A last assistant message is left open, to be continued.
        template_args: values for the chat template.

    Raises:
        InputError: the text is not valid Unicode, has no tokens, the chat template rejects it, or it is a conversation
            and there is no chat template.
    """
    name = f"prompt {prompt_set}/{prompt_id}"
    turns = conversation(text, messages, system_prompt)
    for turn in turns:
        check_unicode(turn["content"], f"{name}: its text or system prompt")
    templated = uses_chat_template(tokenizer, chat_template)
    if templated:
        chat = _rendered(tokenizer, turns, template_args)
        ids, offsets = _with_offsets(tokenizer, chat.text)
        n_added = 0
    else:
        if [turn["role"] for turn in turns if turn["role"] != "system"] != ["user"]:
            raise InputError(f"{name}: a conversation needs a chat template, and none is used here: give one text")
        chat = _plain_chat(turns)
        bare, offsets = _with_offsets(tokenizer, chat.text)
        ids = encode(tokenizer, chat.text)
        n_added = len(ids) - len(bare)
    if not ids:
        raise InputError(f"{name}: its text has no tokens")
    opening = _opening(turns, chat) if templated else ""
    return TokenizedPrompt(
        prompt_set=prompt_set,
        id=prompt_id,
        source_text=text,
        text=chat.text,
        token_ids=tuple(ids),
        system_prompt=system_prompt,
        chat_template=templated,
        merged=chat.merged,
        dropped=chat.dropped,
        messages=tuple(messages),
        template_args=dict(template_args),
        spans=tuple(_spans(turns, chat, offsets, n_added)),
        opening=opening,
        thinks=templated and thinks(tokenizer, opening, _instructions(turns, chat)),
    )


def tokenize_prompt(
    tokenizer: Any,
    prompt: Prompt,
    prompt_set: str,
    *,
    system_prompt: str | None,
    chat_template: bool | None,
    template_args: Mapping[str, Any],
) -> TokenizedPrompt:
    """Render and tokenize a prompt of a set, a text or a conversation; arguments and errors are those of `tokenize`."""
    tokenized = tokenize(
        tokenizer,
        prompt.text,
        prompt_set=prompt_set,
        prompt_id=prompt.id,
        system_prompt=system_prompt,
        chat_template=chat_template,
        messages=prompt.messages,
        template_args=template_args,
    )
    return replace(tokenized, fields=prompt.fields)


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
        before = _plain_chat(conversation(prompt, (), system_prompt)).text + separator
        whole = encode(tokenizer, before + response)
        bare, start = _tokens_from(tokenizer, before + response, len(before))
        return PlacedResponse(tuple(whole), len(whole) - len(bare) + start, templated)
    messages = [*conversation(prompt, (), system_prompt), {"role": "assistant", "content": response}]
    chat = render_chat(tokenizer, messages, add_generation_prompt=False)
    span = chat.spans[-1]
    if span is None:
        raise InputError("the response is empty")
    ids, start = _tokens_from(tokenizer, chat.text[: span.stop], span.start)
    return PlacedResponse(tuple(ids), start, templated, chat.merged, chat.dropped)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a plain text with exactly one BOS if the tokenizer has a BOS token.

    Other special tokens that the tokenizer puts in front stay; tokens that it appends, such as EOS, do not.
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


def other_tokens(tokenizer: Any, ids: Sequence[int], texts: Sequence[str]) -> str | None:
    """Why tokens, given by ids and texts, do not belong to a tokenizer; `None` if they do.

    Spaces in front do not count: texts of 0.1.0 lack one of several.
    """
    triples = zip(ids, token_texts(tokenizer, ids), texts, strict=True)
    others = (each for each in triples if each[1].lstrip(" ") != each[2].lstrip(" "))
    return next((f"token {each} is {text!r} there, and {own!r} here" for each, own, text in others), None)


def bos_policy(tokenizer: Any, ids: Sequence[int], *, chat_template: bool) -> dict[str, Any]:
    """How many BOS tokens a sequence starts with (`count`), and their source (`by`).

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
        # SentencePiece decoders drop the first space of what is decoded on its own.
        n_spaces = len(piece) - len(piece.lstrip("\u2581")) if isinstance(piece, str) else 0
        table[i] = " " + text if n_spaces > len(text) - len(text.lstrip(" ")) else text
    return [table[i] for i in ids]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a sequence of token ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _rendered(tokenizer: Any, turns: Sequence[Message], template_args: Mapping[str, Any]) -> RenderedChat:
    """A conversation up to the beginning of the response: after a generation prompt, or within the last message."""
    if not is_continued(turns):
        return render_chat(tokenizer, turns, template_args=template_args)
    chat = render_chat(tokenizer, turns, add_generation_prompt=False, template_args=template_args)
    last = chat.spans[-1]
    if last is None or any(span is not None and span.start > last.start for span in chat.spans):
        raise InputError(f"the model's chat template cannot leave the last assistant message open: {ADVICE}")
    return replace(chat, text=chat.text[: last.stop])


def _plain_chat(turns: Sequence[Message]) -> RenderedChat:
    """A text without a template, with a system prompt before it."""
    texts = [turn["content"] for turn in turns if turn["content"] or turn["role"] == "user"]
    text = "\n\n".join(texts)
    user = Span(len(text) - len(texts[-1]), len(text))
    system = Span(0, len(texts[0])) if len(texts) > 1 else None
    return RenderedChat(text, tuple(system if turn["role"] == "system" else user for turn in turns))


def _instructions(turns: Sequence[Message], chat: RenderedChat) -> str:
    """The beginning of a rendering, up to the first message that is not the system's."""
    starts = [span.start for turn, span in zip(turns, chat.spans, strict=True) if span and turn["role"] != "system"]
    return chat.text[: min(starts, default=len(chat.text))]


def _opening(turns: Sequence[Message], chat: RenderedChat) -> str:
    """The end of a rendering, after the last message that is not a beginning of the response."""
    others = [
        span.stop
        for turn, span in zip(turns, chat.spans, strict=True)
        if span is not None and not (turn is turns[-1] and turn["role"] == "assistant")
    ]
    return chat.text[max(others, default=0) :]


def _spans(turns: Sequence[Message], chat: RenderedChat, offsets: Offsets | None, n_added: int) -> list[TokenSpan]:
    """The spans of a prompt, with `n_added` tokens of the tokenizer before its text; turns without one come last."""
    roles = [turn["role"] for turn in turns]
    if offsets is None:
        return [unfound(role, NO_OFFSETS) for role in roles]
    placed = zip(roles, chat.spans, strict=True)
    known = [TextSpan(*span, "turn", role) for role, span in placed if span is not None]
    added = [TokenSpan(kind="template", role=None, start=0, stop=n_added)] if n_added else []
    found = added + spans_of_text(known, len(chat.text), offsets, n_added)
    missing = (turn for turn, span in zip(turns, chat.spans, strict=True) if span is None)
    return found + [unfound(each["role"], SEVERAL_PLACES if each["content"].strip() else NO_TEXT) for each in missing]


def _with_offsets(tokenizer: Any, text: str) -> tuple[list[int], Offsets | None]:
    """The ids of a text without added special tokens, and the characters of each; `None` if those are unknown."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), found["offset_mapping"]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    texts = token_texts(tokenizer, ids)
    ends = list(accumulate(map(len, texts)))
    return ids, list(zip([0, *ends[:-1]], ends, strict=True)) if "".join(texts) == text else None


def _tokens_from(tokenizer: Any, text: str, start: int) -> tuple[list[int], int]:
    """The ids of a text without added special tokens, and the index of the first token beyond character `start`."""
    if not getattr(tokenizer, "is_fast", False):  # has no offsets
        ids, before = (list(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (text, text[:start]))
        return ids, n_shared(ids, before)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    return ids, next((n for n, (_, stop) in enumerate(found["offset_mapping"]) if stop > start), len(ids))


def check_unicode(text: str, name: str) -> None:
    """Raise `InputError`, which begins with a name, for a text that is not valid Unicode."""
    if not is_unicode(text):
        raise InputError(f"{name} is not valid Unicode")
