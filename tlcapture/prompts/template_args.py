"""Values that a chat template reads: `--thinking on|off`, where it has such a switch, and `--template-arg`.

Importing this module loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tlcapture.errors import InputError
from tlcapture.prompts.chat_template import ADVICE, render_chat, uses_chat_template

THINKING = {"on": True, "off": False}

_SWITCHES = ("enable_thinking", "thinking", "reasoning")  # in the templates of published models
_QUESTION = {"role": "user", "content": "tlcapture"}
# Arguments of apply_chat_template that are no values for the template.
_RESERVED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "truncation",
}  # fmt: skip


def template_args(
    tokenizer: Any, thinking: str | None, given: Mapping[str, Any], *, chat_template: bool | None = None
) -> dict[str, Any]:
    """All values for the chat template, with that of its switch for thinking.

    Args:
        thinking: `on`, `off`, or `None` to leave the template's default.
        given: other values by name.
        chat_template: see `uses_chat_template`.

    Raises:
        InputError: there is no chat template, or it has no switch or does not read a value that is given.
    """
    if thinking is None and not given:
        return {}
    if thinking not in (None, *THINKING):
        raise InputError(f"thinking {thinking!r}: expected on or off")
    asked = "--thinking" if thinking is not None else "--template-arg"
    if not uses_chat_template(tokenizer, chat_template):
        raise InputError(f"{asked} is for a chat template, and prompts are not rendered with one here: leave it out")
    for name in given:
        if name in _RESERVED or not _mentions(tokenizer, name):
            raise InputError(f"--template-arg {name}: the model's chat template reads no value of this name")
    if thinking is None:
        return dict(given)
    return {_switch(tokenizer, given): THINKING[thinking], **given}


def has_switch(tokenizer: Any, given: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's chat template has a switch for thinking that `given` values do not set."""
    try:
        return bool(_switch(tokenizer, given))
    except InputError:
        return False


def _switch(tokenizer: Any, given: Mapping[str, Any]) -> str:
    """The name of the value that turns thinking on and off: renderings with it on and off differ."""
    for name in _SWITCHES:
        if name in given:
            raise InputError(
                f"--thinking and --template-arg {name} are one switch of the chat template: give one of them"
            )
        if _mentions(tokenizer, name):
            on, off = (
                render_chat(tokenizer, [_QUESTION], template_args={**given, name: value}).text
                for value in (True, False)
            )
            if on != off:
                return name
    raise InputError(
        "--thinking: the model's chat template has no switch for thinking "
        f"({', '.join(_SWITCHES)}): leave it out, give another value with --template-arg, or {ADVICE}"
    )


def _mentions(tokenizer: Any, name: str) -> bool:
    template = tokenizer.chat_template
    source = template["default"] if isinstance(template, dict) else template
    return source is not None and re.search(rf"\b{re.escape(name)}\b", source) is not None
