"""Prompts given on the command line: numbering them after those in the set `adhoc`, and reading that set again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tlcapture.captures.capture import Capture
from tlcapture.commands.prompt_files.records import CaptureRecord
from tlcapture.errors import StorageError
from tlcapture.names import base_set, split_name
from tlcapture.prompts.prompt_sets import ADHOC, Prompt, PromptSet
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.validation import reason_of


def numbered_on(layout: Layout, given: PromptSet) -> PromptSet:
    """The prompts, numbered after those in `adhoc` and its variants; a prompt that is already there keeps its id."""
    sets = _sets(layout)
    ids: dict[str, str] = {}
    held = []
    for capture_set, name in ((each, name) for each in sets for name in layout.prompt_ids(each)):
        known = _known(layout, capture_set, name)
        held.append(split_name(name)[0] if known is None else known[0])
        if known is not None:
            ids.setdefault(known[1], known[0])
    following = max((int(prompt_id) for prompt_id in held if prompt_id.isdecimal()), default=0) + 1
    prompts = {}
    for prompt in given.prompts:
        key = _key(prompt.text, prompt.messages)
        if key not in ids:
            ids[key], following = str(following), following + 1
        prompts[ids[key]] = prompt.model_copy(update={"id": ids[key]})
    return given.model_copy(update={"prompts": list(prompts.values())})


def captured_adhoc(layout: Layout) -> tuple[PromptSet | None, list[tuple[str, str]]]:
    """The prompts of the set `adhoc` that have captures or projections in an experiment, with their ids.

    Returns the set, `None` if there are no prompts, and the captures whose prompt cannot be read, with the reasons.
    """
    prompts: dict[str, Prompt] = {}
    refused = []
    for capture_set, name in ((each, name) for each in _sets(layout) for name in layout.prompt_ids(each)):
        try:
            prompt = _prompt(_metadata(layout, capture_set, name))
            prompts.setdefault(str(prompt.id), prompt)
        except (StorageError, KeyError, TypeError, ValidationError) as error:
            refused.append((f"{capture_set}/{name}", f"its prompt cannot be read: {reason_of(error)}"))
    return PromptSet(name=ADHOC, prompts=list(prompts.values())) if prompts else None, refused


def _sets(layout: Layout) -> list[str]:
    """`adhoc` and its variants."""
    return [ADHOC, *(name for name in layout.prompt_sets() if name != ADHOC and base_set(name) == ADHOC)]


def _metadata(layout: Layout, capture_set: str, name: str) -> Mapping[str, Any]:
    raw = layout.residual(capture_set, name)
    if raw.is_file():
        return Capture.open(raw).metadata
    record = CaptureRecord.find(layout, capture_set, name)
    if record is None:
        raise StorageError("its projections do not say what they were made from")
    return record.metadata


def _prompt(metadata: Mapping[str, Any]) -> Prompt:
    messages = metadata.get("messages")
    content: dict[str, Any] = {"messages": list(messages)} if messages else {"text": metadata["prompt_text"]}
    prompt = Prompt.model_validate({"id": metadata["prompt_id"], **content})
    # One of the command line takes the place of a system message, which a prompt set cannot say.
    return prompt.model_copy(update={"system_prompt": metadata.get("system_prompt")})


def _known(layout: Layout, capture_set: str, name: str) -> tuple[str, str] | None:
    """Id and key of the prompt of a capture, or of projections without one; `None` where neither can be read."""
    raw = layout.residual(capture_set, name)
    with suppress(OSError):  # it is not there, or was removed meanwhile
        state = raw.stat()
        return _known_of(raw, state.st_mtime_ns, state.st_size, state.st_ino)
    record = CaptureRecord.find(layout, capture_set, name)
    return None if record is None else _identity(record.metadata)


@lru_cache(maxsize=2**20)
def _known_of(raw: Path, *_state: int) -> tuple[str, str] | None:
    """Id and key of the prompt of a raw file, which is read once for as long as it does not change."""
    try:
        return _identity(Capture.open(raw).metadata)
    except StorageError:
        return None


def _identity(metadata: Mapping[str, Any]) -> tuple[str, str]:
    return str(metadata["prompt_id"]), _key(metadata.get("prompt_text"), metadata.get("messages"))


def _key(text: Any, messages: Any) -> str:
    """A key that two prompts share if they are the same."""
    content = json.dumps([list(messages), None] if messages else [None, text], sort_keys=True, default=str)
    return sha256(content.encode()).hexdigest()
