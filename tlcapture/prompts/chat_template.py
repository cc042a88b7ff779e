"""The model's chat template: rendering conversations, and the tokens that end a response."""

from __future__ import annotations

from typing import Any

from tlcapture.errors import InputError

_PROBE = "tlcapture"


def uses_chat_template(tokenizer: Any, requested: bool | None) -> bool:
    """Whether prompts are rendered with the chat template.

    Args:
        requested: `True` or `False` decides; `None` uses the template if the tokenizer has one.

    Raises:
        InputError: a template is requested and the tokenizer has none.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if requested and not has_template:
        raise InputError("a chat template was requested, but the model's tokenizer has none: use --no-chat-template")
    return has_template if requested is None else requested


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Apply the chat template to `messages`, each with `role` and `content`.

    If the template refuses a system message, its content is put at the start of the first user message.

    Raises:
        InputError: the template cannot render the messages.
    """
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


def stop_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """All token ids that end a response.

    These are the end-of-sequence ids of the tokenizer and the generation config, and the special token that the
    chat template puts after an assistant message.
    """
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = _end_of_turn(tokenizer)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return frozenset(found)


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token directly after an assistant message, if the chat template has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    rendered = render_chat(tokenizer, messages, add_generation_prompt=False)
    after = rendered.rpartition(_PROBE)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None
