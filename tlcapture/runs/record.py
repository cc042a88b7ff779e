"""What a run leaves in its experiment besides its results: `runs/{time}-{command}-{process}.json`.

The record is there, with the status `running`, from the first file that the run writes, so that a
killed one leaves its trace too; it is written again when the run ends.

{"command", "command_line", "arguments": {...}, "status": "running|done|failed|interrupted", "exit_code", "error",
 "started", "ended", "seconds", "versions": {...}, "system": {...}, "model": {...},
 "prompts", "skipped", "removed", "new_tokens", "files": {"count", "bytes", "folders", "list", "not_listed"},
 "failures": [{"what", "reason"}], "warnings": [...]}
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tlcapture.errors import StorageError
from tlcapture.runs.report import RunReport
from tlcapture.storage.files import Written, write_json
from tlcapture.storage.layout import Layout
from tlcapture.version import __version__

_PACKAGES = ("torch", "transformer_lens", "transformers", "numpy")
RUNNING = "running"


@dataclass(frozen=True)
class Invocation:
    """A command as it was called: its name, its words, and what its options came to."""

    command: str
    command_line: str
    arguments: Mapping[str, Any]
    began: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def to_json(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "command_line": _text(self.command_line),
            "arguments": {name: _text(value) for name, value in self.arguments.items()},
            "started": self.began.isoformat(timespec="seconds"),
        }


class RecordedReport(RunReport):
    """A report that is kept in the experiment. `facts` are those that the run adds as it goes."""

    def __init__(self, layout: Layout, invocation: Invocation, facts: Mapping[str, Any]):
        super().__init__(layout.folder)
        self._layout = layout
        self._invocation = invocation
        self._facts = facts
        name = f"{invocation.began:%Y%m%dT%H%M%SZ}-{invocation.command}-{os.getpid()}"
        if shard := invocation.arguments.get("shard"):
            name += f"-{str(shard).replace('/', 'of')}"  # elsewhere a process may have the same number
        self.path: Path = layout.run_record(name)

    def wrote(self, written: Written) -> None:
        super().wrote(written)
        if self.n_files == 1:
            self._write({"status": RUNNING})

    def end(self, status: str, exit_code: int, error: str | None) -> dict[str, Any]:
        """Write the record of the run that has ended; returns what it says.

        A run that wrote nothing into an experiment that is not there leaves no record.
        """
        ended = {
            "status": status,
            "exit_code": exit_code,
            "error": error,
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if not self._layout.folder.is_dir():
            return self._content(ended)
        return self._write(ended)

    def _write(self, state: Mapping[str, Any]) -> dict[str, Any]:
        content = self._content(state)
        try:
            write_json(self.path, content, indent=True)
        except StorageError as error:  # the results are there all the same
            self.warnings.append(f"no record of this run: {error}")
        return content

    def _content(self, state: Mapping[str, Any]) -> dict[str, Any]:
        content = {**self._invocation.to_json(), **state, **_surroundings(), **self._facts, **self.to_json()}
        return {name: _text(value) for name, value in content.items()}


def _text(value: Any) -> Any:
    """A value whose texts are Unicode: what a shell handed over need not be."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _text(each) for name, each in value.items()}
    return [_text(each) for each in value] if isinstance(value, list | tuple) else value


def _surroundings() -> dict[str, Any]:
    """Versions of what computes, and the machine as far as numbers depend on it."""
    versions: dict[str, str | None] = {"tlcapture": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    system = {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()}
    if (torch := sys.modules.get("torch")) is not None:
        system["threads"] = torch.get_num_threads()
    return {"versions": versions, "system": system}
