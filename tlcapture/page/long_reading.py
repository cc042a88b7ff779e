"""Reads the projections of a whole prompt set, which takes long: one set at a time, giving way to other requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock

from tlcapture.commands.top_traits import Summary, summary_of
from tlcapture.names import COMPACT
from tlcapture.storage.layout import Layout
from tlcapture.storage.projection_shards import MERGED

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


_reading = Lock()
_last: tuple[Path, str, str, _States, Read] | None = None


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


def _states(layout: Layout, prompt_set: str, component: str) -> _States:
    """Size and times of the files with projections of a set, by path, and the names of its captures."""
    names = layout.prompt_ids(prompt_set)
    found: _States = dict.fromkeys(names, ())
    shards = layout.shards(component, prompt_set)
    folders = [(shards, COMPACT), (shards / MERGED, COMPACT)]
    for trait, of in layout.projection_folders(prompt_set):
        if of == component and names:
            folders.append((layout.projection(trait, of, prompt_set, names[0]).parent, ".json"))
    for folder, ending in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(ending):
                    state = entry.stat()
                    found[entry.path] = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    return found
