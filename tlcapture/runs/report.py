"""The report of a run: what it wrote, skipped and failed at."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tlcapture.errors import NoSpaceError, TlcaptureError
from tlcapture.folder_names import named
from tlcapture.storage.experiments.file_index import Learned
from tlcapture.text import counted, format_bytes

if TYPE_CHECKING:
    from tlcapture.storage.files import FileState, Written

_MOST_LISTED = 10_000
_MOST_REMEMBERED = 4000  # projections, of some 6 KB each
_log = logging.getLogger(__name__)


class Failed(NamedTuple):
    """A prompt or trait that failed, and the reason."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


@dataclass
class WrittenFiles:
    """The number and size of the files that were written, in total and by folder.

    Attributes:
        folder: paths below it are kept relative to it.
        by_folder: number and size in bytes of the files, by folder.
        listed: path and size in bytes of the first ten thousand files.
    """

    folder: Path
    count: int = 0
    size: int = 0
    by_folder: dict[str, tuple[int, int]] = field(default_factory=dict)
    listed: list[tuple[str, int]] = field(default_factory=list)

    @cached_property
    def _resolved(self) -> str:
        """The beginning of paths below what `folder` is a link to."""
        return f"{self.folder.resolve().as_posix()}/"

    def add(self, written: Written) -> None:
        """Count a file."""
        self.count += 1
        self.size += written.size
        path, begin = written.path.as_posix(), f"{self.folder.as_posix()}/"
        name = path.removeprefix(begin)
        if name == path:
            name = path.removeprefix(self._resolved)
        below = name.rpartition("/")[0] or "."
        count, size = self.by_folder.get(below, (0, 0))
        self.by_folder[below] = (count + 1, size + written.size)
        if len(self.listed) < _MOST_LISTED:
            self.listed.append((name, written.size))

    def to_json(self) -> dict[str, Any]:
        """Counts, sizes and listed files as plain values."""
        folders = {name: {"files": count, "bytes": size} for name, (count, size) in sorted(self.by_folder.items())}
        return {
            "count": self.count,
            "bytes": self.size,
            "folders": folders,
            "list": [list(row) for row in self.listed],
            "not_listed": self.count - len(self.listed),
        }


@dataclass(frozen=True)
class Done:
    """The work of another process or thread, to be added to the report of the run, whose fields have the same names."""

    written: Sequence[Written] = ()
    failures: Sequence[Failed] = ()
    warnings: Sequence[str] = ()
    n_prompts: int = 0
    n_skipped: int = 0
    n_tokens: int = 0
    n_removed: int = 0
    projected: Mapping[str, bytes] = field(default_factory=dict)
    learned: Mapping[Path, Learned] = field(default_factory=dict)


@dataclass
class RunReport:
    """What a run wrote, skipped and failed at.

    Attributes:
        folder: the experiment's folder.
        started: when the run started, on the monotonic clock.
        n_removed: files of earlier runs that were removed and not written again.
        retried: batches of work that were run again after their worker died.
        projected: the part of written projections that the summary needs, by path relative to the folder, as JSON; not
            of all in a large run.
        learned: facts about files that were read or written, for the index of the set's files.
        seen: states of files that the run has looked at or written; not of all in a large run.
    """

    folder: Path
    started: float = field(default_factory=time.monotonic)
    n_prompts: int = 0
    n_skipped: int = 0
    n_tokens: int = 0
    n_removed: int = 0
    failures: list[Failed] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    projected: dict[str, bytes] = field(default_factory=dict)
    learned: dict[Path, Learned] = field(default_factory=dict)
    seen: dict[Path, FileState] = field(default_factory=dict)
    files: WrittenFiles = field(init=False)
    _parts: dict[bytes, bytes] = field(default_factory=dict, repr=False)  # of facts, one object for all equal ones

    def __post_init__(self) -> None:
        self.files = WrittenFiles(self.folder)

    @property
    def n_files(self) -> int:
        """The number of files that were written."""
        return self.files.count

    def wrote(self, written: Written) -> None:
        """Count a file that was written, and keep its facts."""
        self.files.add(written)
        if written.state is not None:
            self.learn(written.path, Learned(written.state, written.facts))

    def learn(self, path: Path, learned: Learned) -> None:
        """Keep the facts found in a file, if any, and its state."""
        if learned.facts:
            parts = (self._parts.setdefault(part, part) for part in learned.facts)
            self.learned[path] = learned._replace(facts=tuple(parts))
        if path in self.seen or len(self.seen) < _MOST_REMEMBERED:
            self.seen[path] = learned.state

    @property
    def remembers(self) -> bool:
        """Whether there is room for the summary's part of one more projection."""
        return len(self.projected) < _MOST_REMEMBERED

    def remember(self, projected: Mapping[str, bytes]) -> None:
        """Keep the summary's part of some projections, as far as there is room for it."""
        for name, content in projected.items():
            if self.remembers or name in self.projected:
                self.projected[name] = content

    def failed(self, what: str, reason: object) -> None:
        """Add a failure."""
        failed = Failed(what, str(reason))
        _log.error("failed: %s", failed)
        self.failures.append(failed)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Report a `TlcaptureError` as a failure and continue, except for `NoSpaceError`, which ends the run."""
        try:
            yield
        except NoSpaceError:
            raise
        except TlcaptureError as error:
            self.failed(what, error)

    def add(self, other: Done) -> None:
        """Add work that was done elsewhere, except for its warnings."""
        for written in other.written:
            self.wrote(written)
        self.failures += other.failures
        self.n_prompts += other.n_prompts
        self.n_skipped += other.n_skipped
        self.n_tokens += other.n_tokens
        self.n_removed += other.n_removed
        self.remember(other.projected)
        for path, learned in other.learned.items():
            self.learn(path, learned)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.monotonic() - self.started

    def summary(self) -> str:
        """One line: number, size and folder of the files, what was skipped or failed, and the time it took."""
        parts = [f"{counted(self.n_files, 'file')} ({format_bytes(self.files.size)}) in {self.folder}"]
        if self.n_tokens:
            parts.append(counted(self.n_tokens, "new token"))
        if self.n_skipped:
            parts.append(f"{counted(self.n_skipped, 'prompt')} skipped: nothing was missing")
        if self.n_removed:
            parts.append(f"{counted(self.n_removed, 'file')} of earlier runs removed and not written again")
        if self.retried:
            parts.append(f"{counted(len(self.retried), 'batch', 'batches')} run again because a worker died")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        return f"wrote {', '.join(parts)}, in {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "folder": named(str(self.folder)),
            "prompts": self.n_prompts,
            "skipped": self.n_skipped,
            "removed": self.n_removed,
            "new_tokens": self.n_tokens,
            "seconds": round(self.seconds, 3),
            "files": self.files.to_json(),
            "failures": [failed._asdict() for failed in self.failures],
            "warnings": self.warnings,
            "retried": self.retried,
        }


class CollectingReport(RunReport):
    """A report that also keeps everything since it was last added to the report of the whole run.

    `whole_remembers` tells whether the report of the whole run has room for parts that a summary needs.
    """

    def __init__(self, folder: Path, *, whole_remembers: bool = True):
        super().__init__(folder)
        self._written: list[Written] = []
        self._whole_remembers = whole_remembers

    @property
    def remembers(self) -> bool:
        """Whether there is room here and in the report of the whole run."""
        return self._whole_remembers and super().remembers

    def wrote(self, written: Written) -> None:
        """Count a file that was written."""
        super().wrote(written)
        self._written.append(written.knowing(None))  # which is in `learned`

    def drain(self) -> Done:
        """The work that was done since the last call."""
        collected = {each.name: getattr(self, each.name) for each in fields(Done) if each.name != "written"}
        done = Done(self._written, **collected)
        for name, value in collected.items():
            setattr(self, name, type(value)())  # an empty list or dict, or 0
        self._written, self._parts = [], {}
        return done
