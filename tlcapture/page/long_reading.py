"""Reads the projections or comparisons of a whole prompt set, which takes long.

One set is read at a time, giving way to other requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock

from tlcapture.commands.comparing.compared_sets import CaptureSet, compared_with
from tlcapture.commands.comparing.summary import ComparisonSummary, SavedComparisons
from tlcapture.commands.projecting.top_traits import Summary, summary_of
from tlcapture.names import COMPACT
from tlcapture.storage.compact.projection_shards import MERGED
from tlcapture.storage.experiments.comparisons import comparison_file
from tlcapture.storage.experiments.layout import Layout

_LONGEST_PAUSE = 1.0  # seconds between two prompts, however many other requests there are

_States = dict[str, tuple[int, ...]]


class _ShortRequests:
    """The short requests that are being answered."""

    def __init__(self) -> None:
        self._n, self._changed = 0, Condition()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Make long reading wait within the context."""
        with self._changed:
            self._n += 1
        try:
            yield
        finally:
            with self._changed:
                self._n -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        """Wait until no other request is being answered."""
        if self._n:
            with self._changed:
                self._changed.wait_for(lambda: not self._n, _LONGEST_PAUSE)


SHORT_REQUESTS = _ShortRequests()


@dataclass(frozen=True)
class Read:
    """The summary of a prompt set, and the problems of files that it leaves out."""

    summary: Summary
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """The summary of a set's comparisons; `b` names the captures of those that are outdated, if there are any."""

    summary: ComparisonSummary
    b: str | None


_reading = Lock()
_last: tuple[Path, str, str, _States, Read] | None = None
_last_compared: tuple[Path, str, str, _States, Compared] | None = None


def summary_read(layout: Layout, prompt_set: str, component: str) -> Read:
    """The summary of a prompt set; the last result if none of its files has changed since."""
    global _last
    states = _states(layout, prompt_set, component)
    with _reading:
        if _last is not None and _last[:4] == (layout.folder, prompt_set, component, states):
            return _last[4]
        _last = None
        problems: dict[str, None] = {}
        summary = summary_of(
            layout,
            prompt_set,
            component,
            on_problem=lambda error: problems.setdefault(str(error)),
            before_each=SHORT_REQUESTS.give_way,
        )
        found = Read(summary, tuple(problems))
        _last = layout.folder, prompt_set, component, states, found
        return found


def comparisons_read(layout: Layout, other: str, prompt_set: str) -> Compared:
    """The comparisons of a prompt set with other captures; the last result if no file has changed since."""
    global _last_compared
    folders = [(comparison_file(layout, other, prompt_set, "x").parent, ".json")]
    for each in (CaptureSet(layout, prompt_set), compared_with(layout, other, prompt_set)):
        folders.append((each.path("x").parent, ".pt"))
    states: _States = {}
    _add_states(states, folders)
    with _reading:
        if _last_compared is not None and _last_compared[:4] == (layout.folder, other, prompt_set, states):
            return _last_compared[4]
        files = SavedComparisons(layout, other, prompt_set, before_each=SHORT_REQUESTS.give_way)
        found = Compared(files.summary(), next(iter(files.outdated.values()), None))
        _last_compared = layout.folder, other, prompt_set, states, found
        return found


def _states(layout: Layout, prompt_set: str, component: str) -> _States:
    """Size and times of the files with projections of a set, by path, and the names of its captures."""
    names = layout.prompt_ids(prompt_set)
    found: _States = dict.fromkeys(names, ())
    shards = layout.shards(component, prompt_set)
    folders = [(shards, COMPACT), (shards / MERGED, COMPACT)]
    for trait, of in layout.projection_folders(prompt_set):
        if of == component and names:
            folders.append((layout.projection(trait, of, prompt_set, names[0]).parent, ".json"))
    _add_states(found, folders)
    return found


def _add_states(found: _States, folders: Sequence[tuple[Path, str]]) -> None:
    """Add the files of folders with an ending."""
    for folder, ending in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(ending):
                    state = entry.stat()
                    found[entry.path] = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
