"""Captures at work, from the records of their runs: how many captures of a set are done, and how many are not.

found = capture_at_work(layout, "single_trait")
found.n_done, found.n_planned, found.is_running
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tlcapture.errors import StorageError
from tlcapture.names import check_capture_set
from tlcapture.runs.record import RUNNING
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.storage.folders import stems_in
from tlcapture.storage.locks import is_held

_MOST_RECORDS = 100  # of the latest runs
_UNFINISHED = (RUNNING, "interrupted")
_SHARD = re.compile(r"-\d+of\d+$")


@dataclass(frozen=True)
class CaptureAtWork:
    """A run that captures a prompt set, or that ended before finishing; shards count as one run.

    Attributes:
        is_running: whether it is running; if not, it was stopped or killed.
        n_done: existing captures: those it made, and those it found.
        n_planned: captures that will exist when it is finished, unless some fail.
        n_failed: prompts that failed.
        command_line: the command as it was called.
    """

    is_running: bool
    n_done: int
    n_planned: int
    n_failed: int
    command_line: str


@dataclass(frozen=True)
class _Recorded:
    """The counts of a run's captures in its record, by prompt set."""

    status: str
    planned: Mapping[str, Mapping[str, int]]
    n_files: Mapping[str, int]
    failures: tuple[str, ...]
    command_line: str


def capture_at_work(layout: Layout, prompt_set: str) -> CaptureAtWork | None:
    """The run that captures a set now, or the latest one if that was stopped or killed; otherwise `None`."""
    is_running = _is_locked(layout, prompt_set)
    found: list[_Recorded] = []
    for name in _latest(layout):
        record = _read(layout.run_record(name))
        if record is None or prompt_set not in record.planned:
            continue
        if record.status not in ((RUNNING,) if is_running else _UNFINISHED):
            break
        if found and not (is_running and _SHARD.search(name)):
            break
        found.append(record)
    if not any(record.planned[prompt_set].get("new") for record in found):
        return None
    counts = [_counts(record, prompt_set) for record in found]
    done, planned, failed = (sum(each) for each in zip(*counts, strict=True))
    return CaptureAtWork(is_running, done, planned, failed, found[0].command_line)


def _latest(layout: Layout) -> list[str]:
    """The names of the records of captures, the latest first."""
    names = stems_in(layout.run_record("any").parent, ".json")
    return sorted((name for name in names if "-capture-" in name), reverse=True)[:_MOST_RECORDS]


def _counts(record: _Recorded, prompt_set: str) -> tuple[int, int, int]:
    """Done, planned and failed captures of a set."""
    new, kept = (record.planned[prompt_set].get(key, 0) for key in ("new", "kept"))
    n_failed = sum(what.startswith(f"{prompt_set}/") for what in record.failures)
    return min(_n_made(record, prompt_set), new) + kept, new + kept, n_failed


def _n_made(record: _Recorded, prompt_set: str) -> int:
    """The number of captures that a run has made: its raw files, or without any, its projections onto one trait."""
    raw = record.n_files.get(f"inference/raw/residual/{prompt_set}", 0)
    places = ("inference/", "analysis/projections/")
    projected = {folder: n for folder, n in record.n_files.items() if folder.startswith(places)}
    return raw or max((n for folder, n in projected.items() if folder.endswith(f"_stream/{prompt_set}")), default=0)


def _is_locked(layout: Layout, prompt_set: str) -> bool:
    name = f"captures-of-{check_capture_set(prompt_set)}"
    return is_held(layout.lock(name)) or any(map(is_held, layout.share_locks(name)))


def _read(path: Path) -> _Recorded | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return _read_once(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=512)
def _read_once(path: Path, _modified: int, _size: int) -> _Recorded | None:
    """A record; `None` if it cannot be read or has no plan, as in earlier versions."""
    try:
        content: Any = read_json(path)
        planned = {str(name): {key: int(n) for key, n in each.items()} for name, each in content["planned"].items()}
        failures = tuple(str(each["what"]) for each in content["failures"])
        n_files = {str(folder): int(each["files"]) for folder, each in content["files"]["folders"].items()}
        return _Recorded(content["status"], planned, n_files, failures, str(content["command_line"]))
    except (StorageError, KeyError, TypeError, ValueError, AttributeError):
        return None
