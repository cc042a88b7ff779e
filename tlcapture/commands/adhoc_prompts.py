"""Numbers for prompts given on the command line, which continue those of the set `adhoc`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.commands.capture_records import CaptureRecord
from tlcapture.errors import StorageError
from tlcapture.names import base_set, split_name
from tlcapture.prompts.prompt_sets import ADHOC, PromptSet
from tlcapture.storage.layout import Layout


def numbered_on(layout: Layout, given: PromptSet) -> PromptSet:
    """The prompts, numbered after those of `adhoc` and its variants; a prompt that exists there keeps its id."""
    sets = [ADHOC, *(name for name in layout.prompt_sets() if name != ADHOC and base_set(name) == ADHOC)]
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
