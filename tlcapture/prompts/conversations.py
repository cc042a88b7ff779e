"""Conversations: the messages of a prompt, checked. Loads no torch.

    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do tides work?"}]

Roles are system, user, assistant and tool; `developer` is another name for system. A content may be a list of parts of
text, `[{"type": "text", "text": "..."}]`. A last assistant message is the beginning of the response, which goes on from
there. Further keys of a message, such as `tool_calls`, are given to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from tlcapture.prompts.message_spans import Message

ROLES = ("system", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(messages: Sequence[Any]) -> tuple[Message, ...]:
    """The messages of a conversation; raises `ValueError` for an invalid one, with its number."""
    if not messages:
        raise ValueError("messages: expected at least one")
    checked = tuple(_checked(number, message) for number, message in enumerate(messages, start=1))
    if checked[-1]["role"] == "assistant" and not checked[-1]["content"].strip():
        raise ValueError(f"message {len(checked)}: the last assistant message is empty: leave it out")
    return checked


def system_prompt_of(messages: Sequence[Message]) -> str | None:
    """The text of the system message of a conversation, if it has one."""
    return str(messages[0]["content"]) if messages and messages[0]["role"] == "system" else None


def conversation(text: str, messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The messages of a prompt, a text or a conversation, with `system_prompt` as their system message, if any."""
    turns = list(messages) or [{"role": "user", "content": text}]
    if system_prompt is None:
        return turns
    own = turns[0] if turns[0]["role"] == "system" else {"role": "system"}
    return [{**own, "content": system_prompt}, *(turns[1:] if turns[0]["role"] == "system" else turns)]


def without_system(messages: Sequence[Message] | None) -> list[dict[str, Any]]:
    """The messages of a conversation without the system message, which is compared as the system prompt."""
    return [dict(message) for number, message in enumerate(messages or ()) if number or message["role"] != "system"]


def text_of(messages: Sequence[Message]) -> str:
    """The text that represents a conversation: the last user message, or without one the last message."""
    of_user = [message["content"] for message in messages if message["role"] == "user"]
    return str((of_user or [messages[-1]["content"]])[-1])


def is_continued(messages: Sequence[Message]) -> bool:
    """Whether a response goes on from the last message rather than beginning a new one."""
    return bool(messages) and messages[-1]["role"] == "assistant"


def is_json(value: Any) -> bool:
    """Whether a value can be written as JSON: finite numbers, valid Unicode, texts as keys."""
    try:
        json.dumps(value, allow_nan=False)
        orjson.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _joined(name: str, content: Any) -> Any:
    """The text of a content that is a list of parts of text; any other content as it is."""
    if not isinstance(content, list | tuple):
        return content
    for number, part in enumerate(content, start=1):
        if (
            not isinstance(part, Mapping)
            or part.get("type") not in _TEXT_PARTS
            or not isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{name}: content: part {number} is {kind!r}: expected {{'type': 'text', 'text': ...}}")
    return "".join(part["text"] for part in content)


def _checked(number: int, message: Any) -> Message:
    from tlcapture.storage.validation import in_few_words  # loads pydantic

    name = f"message {number}"
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise ValueError(f'{name}: expected {{"role", "content"}}, found {in_few_words(message)}')
    role, content = message.get("role"), _joined(name, message.get("content"))
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ValueError(f"{name}: role {role!r}: expected one of {', '.join(ROLES)}")
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    if content is None and others and role == "assistant":
        content = ""  # a message that only calls tools
    if not isinstance(content, str):
        raise ValueError(f"{name}: content: expected a text, found {in_few_words(content)}")
    if not content.strip() and role in ("user", "tool"):
        raise ValueError(f"{name}: content is empty")
    for key, value in others.items():
        if not is_json([key, value]):
            raise ValueError(f"{name}: {key!a}: expected a JSON value, which metadata can record")
    return {"role": role, "content": content, **others}
