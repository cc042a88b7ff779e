"""From a prompt to token ids: chat template, one BOS, and where a response ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tlcapture.errors import InputError

_PROBE = "tlcapture"
# Texts of tokens that were asked for before, by tokenizer: a logit lens asks for thousands, again and again.
_texts: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model gets it: its place, the text as given and as rendered, and the ids."""

    prompt_set: str
    id: str
    source_text: str
    text: str
    token_ids: tuple[int, ...]
    system_prompt: str | None
    chat_template: bool


def uses_chat_template(tokenizer: Any, asked: bool | None) -> bool:
    """Whether prompts go through the chat template: as asked, otherwise where the tokenizer has one."""
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if asked and not has_one:
        raise InputError("a chat template was asked for, but the model's tokenizer has none: use --no-chat-template")
    return has_one if asked is None else asked


def tokenize(
    tokenizer: Any,
    text: str,
    *,
    prompt_set: str,
    prompt_id: str,
    system_prompt: str | None = None,
    chat_template: bool | None = None,
) -> TokenizedPrompt:
    """Render and tokenise one prompt.

    With a chat template the rendered text already holds every special token, so none is added again.
    Without one the model's BOS comes first, once, when its tokenizer has one.
    """
    name = f"prompt {prompt_set}/{prompt_id}"
    for what in (text, system_prompt or ""):
        _check_unicode(what, name)
    templated = uses_chat_template(tokenizer, chat_template)
    if templated:
        rendered = render_chat(tokenizer, [*_system(system_prompt), {"role": "user", "content": text}])
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        rendered = f"{system_prompt}\n\n{text}" if system_prompt else text
        ids = with_bos(tokenizer, tokenizer(rendered)["input_ids"])
    if not ids:
        raise InputError(f"{name}: its text has no tokens")
    return TokenizedPrompt(prompt_set, prompt_id, text, rendered, tuple(ids), system_prompt, templated)


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Apply the chat template. A template without a system role gets it at the head of the user's message."""
    from jinja2.exceptions import TemplateError

    try:
        try:
            return _render(tokenizer, messages, add_generation_prompt)
        except TemplateError:
            if messages[0]["role"] != "system":
                raise
        system, user, *rest = messages
        merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        return _render(tokenizer, [merged, *rest], add_generation_prompt)
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses the prompt ({error}): use --no-chat-template") from None


def with_bos(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """`ids` with the tokenizer's BOS in front, unless there is none or it is there already."""
    bos = tokenizer.bos_token_id
    return list(ids) if bos is None or list(ids[:1]) == [bos] else [bos, *ids]


def bos_policy(tokenizer: Any, ids: Sequence[int], *, chat_template: bool) -> dict[str, Any]:
    """How many BOS a sequence begins with, and by whom: `chat template`, `tlcapture`, or `None` without any."""
    bos = tokenizer.bos_token_id
    count = 0 if bos is None else next((place for place, i in enumerate(ids) if i != bos), len(ids))
    return {"count": count, "by": ("chat template" if chat_template else "tlcapture") if count else None}


def stop_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Every id that ends a response: end of sequence of tokenizer and generation config, end of turn."""
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = _end_of_turn(tokenizer)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return frozenset(found)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token on its own; half a character shows as U+FFFD (ids are the truth)."""
    if not ids:
        return []
    table = _texts.setdefault(tokenizer, {})
    new = sorted(set(ids) - table.keys())
    pieces = tokenizer.convert_ids_to_tokens(new)
    texts = tokenizer.batch_decode([[i] for i in new], clean_up_tokenization_spaces=False) if new else []
    for i, piece, text in zip(new, pieces, texts, strict=True):
        # SentencePiece decoders drop the space that begins a word when the word stands alone.
        begins_word = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
        table[i] = " " + text if begins_word else text
    return [table[i] for i in ids]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a response, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: its text or system prompt is no valid Unicode") from None


def _system(system_prompt: str | None) -> list[dict[str, str]]:
    return [] if system_prompt is None else [{"role": "system", "content": system_prompt}]


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right behind an assistant's words."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    rendered = render_chat(tokenizer, messages, add_generation_prompt=False)
    behind = rendered.rpartition(_PROBE)[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None
