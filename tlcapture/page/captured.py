"""What the page shows of a raw capture: its text and tokens, read from the capture's index without torch."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.prompts.prompt_sets import Prompt
from tlcapture.storage.archives import Archive
from tlcapture.storage.layout import Layout
from tlcapture.traits.saved_projections import SavedProjection, all_saved

_INDEX = "tlcapture.json"
_TEXT_AT_THE_START = re.compile(rb'\{\s*"prompt"\s*:\s*\{\s*"text"\s*:\s*("(?:[^"\\]|\\.)*")')
_HEAD = 2**16


def captured_tokens(path: Path) -> dict[str, Any]:
    """The `tokens`, `n_prompt_tokens`, `prompt_text`, `text` (of the response) and `spans` of a raw residual file.

    Raises `StorageError` for a file that cannot be read.
    """
    content = _index(path) or _pickled(path)
    try:
        prompt, response = content["prompt"], content["response"]
        tokens = [*prompt["tokens"], *response["tokens"]]
        if not all(isinstance(text, str) for text in (*tokens, prompt["text"], response["text"])):
            raise TypeError
    except (KeyError, TypeError):
        raise StorageError(f"{path}: not a raw residual file: capture the prompt again with --overwrite") from None
    return {
        "tokens": tokens,
        "n_prompt_tokens": len(prompt["tokens"]),
        "prompt_text": prompt["text"],
        "text": response["text"],
        "spans": list(content.get("spans", ())),
    }


def _index(path: Path) -> Mapping[str, Any] | None:
    """The index of a file; `None` for a file without one."""
    try:
        archive = Archive(path)
        found = json.loads(archive.read(_INDEX)) if _INDEX in archive else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path}: cannot be read: {error}: capture the prompt again with --overwrite") from None
    return found if isinstance(found, dict) else None


def _pickled(path: Path) -> Mapping[str, Any]:
    """The content of a file without an index, which only torch can read."""
    from tlcapture.captures.capture import Capture

    capture = Capture.open(path)
    parts = {name: getattr(capture, name) for name in ("prompt", "response")}
    found: dict[str, Any] = {name: {"text": part.text, "tokens": list(part.tokens)} for name, part in parts.items()}
    return {**found, "spans": [span.to_json() for span in capture.spans]}


def shown_text(layout: Layout, prompt_set: str, prompt_id: str, prompt: Prompt | None) -> str:
    """The text of a prompt in its set if the captured prompt contains it, else the captured prompt."""
    text = prompt.text if prompt else None
    try:
        saved = all_saved(layout, prompt_set, prompt_id)
    except TlcaptureError:  # of a shard
        saved = []
    for each in saved:
        if each.sharded is not None:
            captured = _text_in_shard(each)
            if captured:
                return text if text and text.strip() in captured else captured
            continue
        if not each.path.is_file():
            continue
        with each.path.open("rb") as file:
            match = _TEXT_AT_THE_START.match(file.read(_HEAD))
        try:
            captured = str(orjson.loads(match[1])) if match else ""
        except orjson.JSONDecodeError:
            captured = ""
        if captured:
            return text if text and text.strip() in captured else captured
    return text or _captured_text(layout.residual(prompt_set, prompt_id))


def _captured_text(path: Path) -> str:
    try:
        return str(captured_tokens(path)["prompt_text"]) if path.is_file() else ""
    except TlcaptureError:  # which the prompt itself and the overview name
        return ""


def _text_in_shard(saved: SavedProjection) -> str:
    try:
        return saved.read().prompt.text
    except TlcaptureError:
        return ""
