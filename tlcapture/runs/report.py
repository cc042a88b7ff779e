"""What a run says while it goes and when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


class Progress:
    """A count that goes up; this one shows nothing."""

    def advance(self, units: int = 0, *, done: str | None = None) -> None:
        """Count `units` (tokens, examples), and say what was `done` with them."""


class Reporter:
    """Where a run's lines and progress go; this one keeps quiet. The command line has another."""

    def line(self, text: str) -> None:
        """Something worth a line."""

    def warn(self, text: str) -> None:
        """Something the user should know before believing the numbers."""

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        """Show how far a piece of work of `total` units is."""
        yield Progress()


@dataclass
class RunReport:
    """What a run wrote, skipped and failed at."""

    folder: Path
    started: float = field(default_factory=time.monotonic)
    n_prompts: int = 0
    n_skipped: int = 0
    n_tokens: int = 0
    n_files: int = 0
    n_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def wrote(self, size: int) -> None:
        self.n_files += 1
        self.n_bytes += size

    def failed(self, what: str, reason: object) -> None:
        self.failures.append(f"{what}: {reason}")

    def warn(self, text: str, reporter: Reporter) -> None:
        """Pass on a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            reporter.warn(text)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def summary(self) -> str:
        """One line: what was written, where, how big, how long it took."""
        parts = [f"{self.n_files} files ({format_bytes(self.n_bytes)}) in {self.folder}"]
        if self.n_tokens:
            parts.append(f"{self.n_tokens} new tokens")
        if self.n_skipped:
            parts.append(f"{self.n_skipped} prompts skipped: nothing was missing")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        return f"wrote {', '.join(parts)}, in {self.seconds:.1f} s"


def format_bytes(count: float) -> str:
    """`1536` as `1.5 KB`, in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
