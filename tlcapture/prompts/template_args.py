"""Values that a chat template reads: `--thinking on|off`, where it has such a switch, and `--template-arg`.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tlcapture.errors import InputError
from tlcapture.prompts.chat_template import ADVICE, QUESTION, SWITCHES, check_renders, render_chat, uses_chat_template
from tlcapture.prompts.conversations import is_json

THINKING = {"on": True, "off": False}

# Arguments of apply_chat_template, and values that it hands over itself.
_RESERVED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "self", "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip
_FUNCTIONS = {"raise_exception", "strftime_now"}  # which transformers hands over
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # a tag of transformers' own


def template_args(
    tokenizer: Any, thinking: str | None, given: Mapping[str, Any], *, chat_template: bool | None = None
) -> dict[str, Any]:
    """All values for the chat template, including its switch for thinking.

    Args:
        thinking: `on`, `off`, or `None` to leave the template's default.
        given: other values by name.
        chat_template: see `uses_chat_template`.

    Raises:
        InputError: there is no chat template, or it has no switch, does not read a given value, or fails with it.
    """
    if thinking is None and not given:
        return {}
    if thinking not in (None, *THINKING):
        raise InputError(f"thinking {thinking!r}: expected on or off")
    asked = "--thinking" if thinking is not None else "--template-arg"
    if not uses_chat_template(tokenizer, chat_template):
        raise InputError(f"{asked} is for a chat template, and prompts are not rendered with one here: leave it out")
    for name, value in given.items():
        _check(tokenizer, name, value)
    _check_rendering(tokenizer, given)
    if thinking is None:
        return dict(given)
    return {_switch(tokenizer, given): THINKING[thinking], **given}


def parse_template_arg(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`: a name, and JSON or else a text; raises `InputError` for anything else."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise InputError(f"{text!r} is not KEY=VALUE with a name such as enable_thinking.")
    try:
        return key, json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return key, value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def has_switch(tokenizer: Any, given: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's chat template has a switch for thinking that `given` values do not set."""
    try:
        return bool(_switch(tokenizer, given))
    except InputError:
        return False


def _check(tokenizer: Any, name: str, value: Any) -> None:
    if name in _RESERVED:
        raise InputError(f"--template-arg {name}: tlcapture sets it itself: leave it out")
    if not _reads(tokenizer, name):
        raise InputError(f"--template-arg {name}: the model's chat template reads no value of this name")
    if not is_json(value):
        raise InputError(f"--template-arg {name}: expected a JSON value, which metadata can record")


def _check_rendering(tokenizer: Any, given: Mapping[str, Any]) -> None:
    """Raise `InputError` if the template fails with these values but not without them."""
    if not given:
        return
    try:
        check_renders(tokenizer, given)
    except InputError as error:
        check_renders(tokenizer)
        reason = str(error).removesuffix(f": {ADVICE}")
        raise InputError(f"--template-arg {', '.join(given)}: {reason}: give another value") from None


def _switch(tokenizer: Any, given: Mapping[str, Any]) -> str:
    """The name of the value that turns thinking on and off: renderings with it on and off differ."""
    for name in SWITCHES:
        if name in given:
            raise InputError(
                f"--thinking and --template-arg {name} are one switch of the chat template: give one of them"
            )
        if _reads(tokenizer, name):
            on, off = (
                render_chat(tokenizer, [QUESTION], template_args={**given, name: value}).text for value in (True, False)
            )
            if on != off:
                return name
    raise InputError(
        "--thinking: the model's chat template has no switch for thinking "
        f"({', '.join(SWITCHES)}): leave it out, or give another value with --template-arg"
    )


def _reads(tokenizer: Any, name: str) -> bool:
    template = tokenizer.chat_template
    source = template.get("default") if isinstance(template, dict) else template
    return source is not None and name in _values_read(source)


@lru_cache(maxsize=8)
def _values_read(source: str) -> frozenset[str]:
    """Names of the values that a chat template reads; for an invalid template, all its words."""
    from jinja2 import Environment, TemplateError
    from jinja2.meta import find_undeclared_variables

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    except TemplateError:
        return frozenset(re.findall(r"\w+", source))
    return frozenset(find_undeclared_variables(tree)) - _FUNCTIONS
