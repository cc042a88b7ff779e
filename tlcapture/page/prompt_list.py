"""The captures of a prompt set as the page lists them: each folder is read once, and at most one file of a capture."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os.path import sep
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import Any

import orjson

from tlcapture.captures.notes import note_counts, notes_folder
from tlcapture.errors import TlcaptureError
from tlcapture.names import Trait, base_set, split_name
from tlcapture.page.captured import captured_tokens, given_text
from tlcapture.prompts.prompt_sets import ADHOC, Prompt
from tlcapture.storage.compact.projection_shards import MERGED, sharded_texts
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.folders import stems_in
from tlcapture.storage.remote.roots import local
from tlcapture.views.hooks import COMPONENTS

_TEXT_AT_THE_START = re.compile(rb'\{\s*"prompt"\s*:\s*\{\s*"text"\s*:\s*("(?:[^"\\]|\\.)*")')
_HEAD = 2**16
Folders = Sequence[tuple[Trait, str]]


def listed_prompts(
    layout: Layout, prompt_set: str, names: Sequence[str], prompts: Mapping[str, Prompt], folders: Folders
) -> list[dict[str, Any]]:
    """The captures of a set by their `names`, at least one: id, text, whether each has attention and logit lens.

    A capture with notes has their number as `notes`.

    Args:
        prompts: the prompts of the set's file, by id as text.
        folders: the traits and components that the set is projected onto.
    """
    first = names[0]
    views = {
        "attention": _having(layout.forms(layout.attention(prompt_set, first)), first),
        "logit_lens": _having(layout.forms(layout.logit_lens(prompt_set, first)), first),
    }
    texts: dict[str, str] = {}
    for component in COMPONENTS:
        texts = sharded_texts(layout.shards(component, prompt_set)) | texts
    places = _folders_of_json(layout, prompt_set, first, folders)
    found, notes = [], note_counts(layout, prompt_set)
    for name in names:
        prompt_id, sample = (name, None) if name in prompts else split_name(name)
        own = prompts.get(prompt_id)
        given = given_text(layout.residual(prompt_set, name)) if base_set(prompt_set) == ADHOC else ""
        captured = given or texts.get(name) or _text_in_json(layout, places, name)
        captured = captured or _text_of_capture(layout.residual(prompt_set, name))
        found.append(
            {
                "id": own.id if own is not None and sample is None else name,
                **({} if sample is None else {"prompt": prompt_id, "sample": sample}),
                "text": _shown(own.text if own else None, captured),
                **{view: name in having for view, having in views.items()},
                **({"notes": notes[name]} if name in notes else {}),
            }
        )
    return found


def folders_listed(layout: Layout, prompt_set: str, folders: Folders) -> list[Path]:
    """The folders whose files decide what `listed_prompts` says."""
    found = [layout.residual(prompt_set, "x").parent, layout.attention(prompt_set, "x").parent]
    found.append(notes_folder(layout, prompt_set))
    for component in COMPONENTS:
        shards = layout.shards(component, prompt_set)
        found += [shards, shards / MERGED]
    return [*found, *map(Path, _folders_of_json(layout, prompt_set, "x", folders))]


def _having(forms: Sequence[Path], name: str) -> set[str]:
    """The captures that have a file in one of `forms`, which gives the path for the capture `name`."""
    return {each for path in forms for each in stems_in(path.parent, path.name[len(name) :])}


def _shown(text: str | None, captured: str) -> str:
    """The text of a prompt in its set if the captured prompt contains it, else the captured prompt."""
    if not captured:
        return text or ""
    return text if text and text.strip() in captured else captured


def _text_of_capture(path: Path) -> str:
    try:
        return str(captured_tokens(path)["prompt_text"]) if path.is_file() else ""
    except TlcaptureError:  # which the prompt itself and the overview name
        return ""


def _folders_of_json(layout: Layout, prompt_set: str, name: str, folders: Folders) -> list[str]:
    """The folders that may hold projection files of a set as JSON, where a capture `name` would have one."""
    found = []
    for trait, component in folders:
        with suppress(TlcaptureError):  # behind a link that leads out
            found.append(str(layout.projection(trait, component, prompt_set, name).parent))
    return found


def _text_in_json(layout: Layout, folders: Sequence[str], name: str) -> str:
    """The text of a captured prompt, from the start of the first projection file that has it there."""
    for folder in folders:
        with suppress(OSError, TlcaptureError, orjson.JSONDecodeError):
            match = _TEXT_AT_THE_START.match(_head(layout, f"{folder}{sep}{name}.json"))
            captured = str(orjson.loads(match[1])) if match else ""
            if captured:
                return captured
    return ""


def _head(layout: Layout, path: str) -> bytes:
    """The beginning of a file; raises `OSError` or `TlcaptureError` if there is no readable file."""
    kind = os.lstat(path).st_mode
    if S_ISLNK(kind):
        kind = layout.own(Path(path)).stat().st_mode
    if not S_ISREG(kind):
        raise FileNotFoundError(path)
    local(Path(path))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, _HEAD)
    finally:
        os.close(descriptor)
