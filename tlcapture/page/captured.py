"""The page's content of a raw capture: its text and tokens, read from the capture's index without torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcapture.captures.capture_names import INDEX, check_place
from tlcapture.errors import StorageError
from tlcapture.storage.archives import Archive


def captured_tokens(path: Path) -> dict[str, Any]:
    """The `tokens`, `n_prompt_tokens`, `prompt_text`, `text` (of the response) and `spans` of a raw residual file.

    Raises `StorageError` for a file that cannot be read.
    """
    content = _index(path) or _pickled(path)
    check_place(content.get("metadata") or {}, path)
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


def is_capture(path: Path) -> bool:
    """Whether a file is a raw residual file, judged by everything except its activations."""
    try:
        captured_tokens(path)
    except StorageError:
        return False
    return True


def given_text(path: Path) -> str:
    """The text of a prompt as it was given, before the chat template; empty if the file does not say."""
    try:
        content = (_index(path) or {}) if path.is_file() else {}
    except StorageError:  # which the prompt itself and the overview name
        return ""
    return str(content.get("metadata", {}).get("prompt_text") or "")


def _index(path: Path) -> Mapping[str, Any] | None:
    """The index of a file; `None` for a file without one."""
    try:
        archive = Archive(path)
        found = json.loads(archive.read(INDEX)) if INDEX in archive else None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path}: cannot be read: {error}: capture the prompt again with --overwrite") from None
    return found if isinstance(found, dict) else None


def _pickled(path: Path) -> Mapping[str, Any]:
    """The content of a file without an index, which only torch can read."""
    from tlcapture.captures.capture import Capture

    capture = Capture.open(path)
    parts = {name: getattr(capture, name) for name in ("prompt", "response")}
    found: dict[str, Any] = {name: {"text": part.text, "tokens": list(part.tokens)} for name, part in parts.items()}
    return {**found, "spans": [span.to_json() for span in capture.spans]}
