"""The paths of comparisons: `analysis/compare/{other}/{prompt_set}/{id}.json` in an experiment.

`other` names the captures that were compared with those of the prompt set, `EXPERIMENT[+SET][@VARIANT]`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tlcapture.errors import InputError, StorageError
from tlcapture.names import (
    PromptId,
    check_capture_set,
    file_name,
    is_capture_set,
    is_compared_name,
    is_safe_name,
)
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.folders import holds_any, natural, stems_in, subfolders


def comparison_file(layout: Layout, other: str, prompt_set: str, prompt_id: PromptId) -> Path:
    """The comparison of a prompt, or of one of its samples."""
    return layout.own(_folder(layout, other, prompt_set) / f"{file_name(prompt_id)}.json")


def comparisons(layout: Layout) -> list[tuple[str, str]]:
    """The names of the other captures, and the prompt sets or variants that were compared with them, sorted."""
    found = []
    for name, path in subfolders(layout.folder / "analysis" / "compare"):
        other, _, prompt_set = name[:-1].partition("/")
        if is_compared_name(other) and is_capture_set(prompt_set) and holds_any(path, ".json"):
            with suppress(StorageError):  # behind a link that leads out
                layout.own(path)
                found.append((other, prompt_set))
    return sorted(found)


def compared(layout: Layout, other: str, prompt_set: str) -> list[str]:
    """The names of the compared prompts of a set, and of their samples: numbers in numerical order, then names."""
    found = stems_in(layout.own(_folder(layout, other, prompt_set)), ".json")
    return sorted(filter(is_safe_name, found), key=natural)


def _folder(layout: Layout, other: str, prompt_set: str) -> Path:
    if not is_compared_name(other):
        raise InputError(f"{other!r} does not name captures that were compared")
    return layout.folder / "analysis" / "compare" / other / check_capture_set(prompt_set)
