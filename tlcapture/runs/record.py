"""The record of a run in its experiment: `runs/{time}-{command}-{process}.json`.

It is first written, with the status `running`, after the first file of the run, so that killed runs have a record too.
It is rewritten every few seconds while the run goes on, and when it ends.

{"command", "command_line", "arguments": {...}, "status": "running|done|failed|interrupted", "exit_code", "error",
 "started", "ended", "seconds", "versions": {...}, "system": {...}, "model": {...},
 "planned": {"single_trait": {"new": 58, "kept": 2}},         (captures to be made and those that are there, by set)
 "prompts", "skipped", "removed", "new_tokens", "files": {"count", "bytes", "folders", "list", "not_listed"},
 "failures": [{"what", "reason"}], "warnings": [...]}
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from itertools import chain, count
from math import inf
from pathlib import Path
from typing import Any

from tlcapture.errors import StorageError
from tlcapture.runs.report import Done, RunReport
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, write_json
from tlcapture.storage.remote.working_copies import HOST, is_running
from tlcapture.version import __version__, installed

_PACKAGES = ("torch", "transformer_lens", "transformers", "numpy")
RUNNING = "running"
_EVERY = 2.0  # seconds between two writes of the record of a running run,
_TIMES = 100  # or so many times as long as the last one took


@dataclass(frozen=True)
class Invocation:
    """A command as it was called: its name, its command line, and the values of its options, including defaults."""

    command: str
    command_line: str
    arguments: Mapping[str, Any]
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_json(self) -> dict[str, Any]:
        """The fields of the record that describe the command."""
        return {
            "command": self.command,
            "command_line": self.command_line,
            "arguments": dict(self.arguments),
            "started": self.began.isoformat(timespec="seconds"),
        }


class RecordedReport(RunReport):
    """A report that is stored in the experiment. `facts` is read at every write, and may be extended by the run."""

    def __init__(self, layout: Layout, invocation: Invocation, facts: Mapping[str, Any]):
        super().__init__(layout.folder)
        self._layout = layout
        self._invocation = invocation
        self._facts = facts
        name = f"{invocation.began:%Y%m%dT%H%M%SZ}-{invocation.command}-{os.getpid()}"
        if shard := invocation.arguments.get("shard"):
            name += f"-{str(shard).replace('/', 'of')}"  # processes of different machines can have the same number
        numbered = chain([name], (f"{name}-{number}" for number in count(2)))  # runs of one process, in one second
        self.path: Path = next(path for path in map(layout.run_record, numbered) if not path.exists())
        self._next_write = 0.0
        self._is_adding = False

    def wrote(self, written: Written) -> None:
        """Count a file that was written; the first one also starts the record."""
        super().wrote(written)
        if not self._is_adding:
            self._write_at_times()

    def add(self, other: Done) -> None:
        """Add work that was done elsewhere."""
        self._is_adding = True
        super().add(other)
        self._is_adding = False
        if self.n_files:
            self._write_at_times()

    def _write_at_times(self) -> None:
        """Write the record of the run so far, if the last one is old enough."""
        before = time.monotonic()
        if before >= self._next_write:
            self._next_write = inf  # another thread may come here meanwhile
            self._write({"status": RUNNING})
            now = time.monotonic()
            self._next_write = now + max(_EVERY, _TIMES * (now - before))

    def end(self, status: str, exit_code: int, error: str | None) -> None:
        """Write the record of a run that has ended, unless it wrote nothing and there is no experiment."""
        if self._layout.folder.is_dir():
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            self._write({"status": status, "exit_code": exit_code, "error": error, "ended": ended})

    def _write(self, state: Mapping[str, Any]) -> None:
        content = {**self._invocation.to_json(), **state, **_surroundings(), **self._facts, **self.to_json()}
        try:
            write_json(self.path, _text(content), indent=True)
        except StorageError as error:  # the results are not affected
            self.warnings.append(f"the record of this run was not written: {error}")


def status_of(record: Mapping[str, Any]) -> str:
    """The status in a record; `killed` for a run whose process has ended on this machine without saying so."""
    status, system = str(record["status"]), record.get("system")
    if status != RUNNING or not isinstance(system, dict) or system.get("host") != HOST:
        return status
    return status if is_running(int(system["process"])) else "killed"


def _text(value: Any) -> Any:
    """A value with valid Unicode strings; those from a shell can contain other bytes, which are escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _text(each) for name, each in value.items()}
    return [_text(each) for each in value] if isinstance(value, list | tuple) else value


def _surroundings() -> dict[str, Any]:
    """The versions of the packages that compute, and the properties of the machine that can change results."""
    versions: dict[str, str | None] = {"tlcapture": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = installed(package)
        except PackageNotFoundError:
            versions[package] = None
    system: dict[str, Any] = {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()}
    system |= {"host": HOST, "process": os.getpid()}
    if (torch := sys.modules.get("torch")) is not None:
        system["threads"] = torch.get_num_threads()
    return {"versions": versions, "system": system}
