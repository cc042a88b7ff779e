"""The model's chat template: rendering conversations, and the tokens that end a response.

A rendering is checked: it must hold the text of every message, so that none is lost silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from tlcapture.errors import InputError
from tlcapture.prompts.bounded_templates import bound_templates
from tlcapture.prompts.message_spans import Message, Span, find_messages
from tlcapture.prompts.step_limit import StepLimitError, step_limit
from tlcapture.text import BYTE_ORDER_MARK, first_line

ADVICE = 'use --no-chat-template, or "use_chat_template": false in config.json'  # which all commands follow

MAX_STEPS = 2_000_000  # lines of Python that one rendering may run; published templates take hundreds a message
SWITCHES = ("enable_thinking", "thinking", "reasoning")  # of the thinking, in the templates of published models
NO_ARGS: Mapping[str, Any] = MappingProxyType({})

QUESTION = {"role": "user", "content": "tlcapture"}  # that every chat template renders
_PROBE, _THOUGHT = "tlcapture", "thought"
_PART = re.compile(r"""\{['"]type['"]: ['"]text['"],""")  # a content part that was printed as it is


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the chat template renders it.

    Attributes:
        text: the rendering.
        spans: where the text of each message is; `None` for a message without text, and for a system message that is in
            several places.
        merged: roles of messages that only white space separates from the next one, such as a system message that the
            template can only put at the start of the user message.
        dropped: what the template leaves out by design: the thinking of earlier assistant messages, and further keys of
            messages that it does not read.
    """

    text: str
    spans: tuple[Span | None, ...]
    merged: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class _RenderingError(Exception):
    """The template cannot render a conversation as it was given; another form of it may work."""


def uses_chat_template(tokenizer: Any, requested: bool | None) -> bool:
    """Whether prompts are rendered with the chat template.

    Args:
        requested: `True` or `False` decides; `None` uses the template if the tokenizer has one.

    Raises:
        InputError: a template is requested and the tokenizer has none, or several and none of them is the default.
    """
    template = getattr(tokenizer, "chat_template", None)
    if requested is False:
        return False
    if requested and not template:
        raise InputError(f"a chat template was requested, but the model's tokenizer has none: {ADVICE}")
    if isinstance(template, dict) and template and "default" not in template:
        names = ", ".join(sorted(map(str, template)))
        raise InputError(
            f"the model's tokenizer has several chat templates ({names}) and none is called default: rename "
            f"one of them in the tokenizer's files, or {ADVICE}"
        )
    return bool(template)


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    template_args: Mapping[str, Any] = NO_ARGS,
) -> RenderedChat:
    """Apply the chat template to `messages`, each with `role` and `content`.

    Where the template does not render the text of every message, it gets each content as a list of parts, and system
    messages at the start of the user messages after them. `template_args` are values that the template may read.

    Raises:
        InputError: the template fails or does not end, or alters or leaves out the text of a message.
    """
    reasons = []
    for form in _forms(messages):

        def render(given: Sequence[Message], form: _Form = form) -> str:
            return _render(tokenizer, form(given), add_generation_prompt, template_args)

        try:
            return _checked(render, messages)
        except _RenderingError as error:
            reasons.append(str(error))
    raise InputError(f"the model's chat template {reasons[0]}: {ADVICE}")


def check_renders(tokenizer: Any, template_args: Mapping[str, Any] = NO_ARGS) -> None:
    """Raise `InputError` if the chat template cannot render even a plain question."""
    render_chat(tokenizer, [QUESTION], template_args=template_args)


def rendered_or_none(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    template_args: Mapping[str, Any] = NO_ARGS,
) -> str | None:
    """The rendering of messages as they are, unchecked; `None` where the template fails or does not end."""
    try:
        return _render(tokenizer, _as_given(messages), add_generation_prompt, template_args)
    except (_RenderingError, InputError):
        return None


def stop_ids(tokenizer: Any, generation_config: Any, *, chat_template: bool = True) -> frozenset[int]:
    """All token ids that end a response.

    These are the end-of-sequence ids of the tokenizer and the generation config and, with `chat_template`, the special
    token that the chat template puts after an assistant message, unless it also comes between thinking and answer.
    """
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = _end_of_turn(tokenizer) if chat_template else None
    if end_of_turn is not None:
        found.add(end_of_turn)
    return frozenset(found)


_Form = Callable[[Sequence[Message]], list[dict[str, Any]]]


def _forms(messages: Sequence[Message]) -> Iterator[_Form]:
    """The forms in which a template may take a conversation, in the order in which they are tried."""
    yield _as_given
    yield _as_parts
    if any(_is_mergeable(one, other) for one, other in pairwise(messages)):
        yield _merged
        yield lambda given: _as_parts(_merged(given))


def _as_given(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


def _as_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _merged(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with each system message at the start of the user message after it."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and _is_mergeable(merged[-1], message):
            message = {**message, "content": f"{merged.pop()['content']}\n\n{message['content']}"}
        merged.append(dict(message))
    return merged


def _is_mergeable(message: Message, following: Message) -> bool:
    return (message["role"], following["role"]) == ("system", "user")


def _checked(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> RenderedChat:
    text = render(messages)
    if _PART.search(text) and not any(_PART.search(message["content"]) for message in messages):
        raise _RenderingError("prints content parts as they are")

    def render_marked(marked: Sequence[Message]) -> str | None:
        try:
            return render(marked)
        except _RenderingError:
            return None

    found = find_messages(text, messages, render_marked)
    if found.missing is not None:
        raise _RenderingError(f"leaves out or alters the text of the {messages[found.missing]['role']} message")
    if found.unclear is not None:
        role = messages[found.unclear]["role"]
        raise InputError(
            f"the model's chat template writes the text of the {role} message in several places, any of which may "
            f"be its turn: {ADVICE}"
        )
    in_order = sorted((span, index) for index, span in enumerate(found.spans) if span is not None)
    merged = [
        messages[index]["role"]
        for (span, index), (following, _) in pairwise(in_order)
        if not text[span.stop : following.start].strip()
    ]
    dropped = [f"thinking of message {index + 1}" for index in found.dropped]
    dropped += [f"{key} of message {index + 1}" for index, key in _unread_keys(render, messages, text)]
    return RenderedChat(text, found.spans, tuple(merged), tuple(dropped))


def _unread_keys(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], text: str
) -> Iterator[tuple[int, str]]:
    """The keys of messages, other than role and content, without which the rendering is the same."""
    for index, message in enumerate(messages):
        for key in message.keys() - {"role", "content"}:
            without = {name: value for name, value in message.items() if name != key}
            try:
                if render([*messages[:index], without, *messages[index + 1 :]]) == text:
                    yield index, key
            except _RenderingError:  # the template needs it
                continue


def _render(
    tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool, template_args: Mapping[str, Any]
) -> str:
    from jinja2.exceptions import TemplateError

    bound_templates()
    options = {**template_args, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        with step_limit(MAX_STEPS):
            rendered = str(tokenizer.apply_chat_template(messages, **options))
        if _has_mark(tokenizer):
            rendered = rendered.removeprefix(BYTE_ORDER_MARK)
        rendered.encode()  # fails for half of a surrogate pair
    except StepLimitError as error:
        raise InputError(f"the model's chat template {error}: {ADVICE}") from None
    except Exception as error:  # a template can raise whatever Python raises
        reason = first_line(error)
        if type(error) is TemplateError:  # what raise_exception raises
            raise _RenderingError(f"refuses the prompt ({reason})") from None
        raise _RenderingError(f"fails ({type(error).__name__}: {reason})") from None
    return rendered


def _has_mark(tokenizer: Any) -> bool:
    """Whether a file of a chat template began with a byte order mark, which transformers takes for text."""
    template = getattr(tokenizer, "chat_template", None)
    templates = template.values() if isinstance(template, dict) else [template]
    return any(str(each).startswith(BYTE_ORDER_MARK) for each in templates)


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token directly after an assistant message, if there is a chat template that has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = render_chat(tokenizer, messages, add_generation_prompt=False)
    except InputError:
        return None
    span = rendered.spans[-1]
    assert span is not None
    ids = tokenizer(rendered.text[span.stop :], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not ids or ids[0] not in special or ids[0] in _after_thinking(tokenizer, messages):
        return None
    return int(ids[0])


def _after_thinking(tokenizer: Any, messages: Sequence[Message]) -> set[int]:
    """The tokens between the thinking of an assistant message and its text, which end neither: gpt-oss's `<|end|>`."""
    found: set[int] = set()
    for key in ("reasoning_content", "thinking"):
        rendered = rendered_or_none(tokenizer, [*messages[:-1], {**messages[-1], key: _THOUGHT}]) or ""
        _, thought, following = rendered.partition(_THOUGHT)
        between, answer, _ = following.partition(_PROBE)
        if thought and answer:
            found.update(tokenizer(between, add_special_tokens=False)["input_ids"])
    return found
