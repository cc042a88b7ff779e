"""Numbers of prompts that are given on the command line: on from those that the set `adhoc` holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.commands.capture_records import CaptureRecord
from tlcapture.errors import StorageError
from tlcapture.names import base_set, split_name
from tlcapture.prompts.prompt_sets import ADHOC, PromptSet
from tlcapture.storage.layout import Layout


def numbered_on(layout: Layout, given: PromptSet) -> PromptSet:
    """The prompts with ids after those of `adhoc` and its variants; one that they hold has the id that it has there."""
    sets = [ADHOC, *(name for name in layout.prompt_sets() if name != ADHOC and base_set(name) == ADHOC)]
    ids: dict[str, str] = {}
    held = []
    for capture_set, name in ((each, name) for each in sets for name in layout.prompt_ids(each)):
        metadata = _metadata(layout, capture_set, name)
        held.append(split_name(name)[0] if metadata is None else str(metadata["prompt_id"]))
        if metadata is not None:
            ids.setdefault(_key(metadata.get("prompt_text"), metadata.get("messages")), held[-1])
    following = max((int(prompt_id) for prompt_id in held if prompt_id.isdecimal()), default=0) + 1
    prompts = {}
    for prompt in given.prompts:
        key = _key(prompt.text, prompt.messages)
        if key not in ids:
            ids[key], following = str(following), following + 1
        prompts[ids[key]] = prompt.model_copy(update={"id": ids[key]})
    return given.model_copy(update={"prompts": list(prompts.values())})


def _metadata(layout: Layout, capture_set: str, name: str) -> Mapping[str, Any] | None:
    """Metadata of a capture, or of projections without one; `None` where there are none that can be read."""
    raw = layout.residual(capture_set, name)
    try:
        if raw.is_file():
            return Capture.open(raw).metadata
    except StorageError:
        return None
    record = CaptureRecord.find(layout, capture_set, name)
    return None if record is None else record.metadata


def _key(text: Any, messages: Any) -> str:
    return json.dumps([list(messages), None] if messages else [None, text], sort_keys=True, default=str)
