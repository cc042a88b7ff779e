"""A run of a command: the experiment it works in, the report of what it did, and the display that shows it.

    run = Run.begin(layout, display)
    with run.progress(len(prompts), "single_trait", "prompt") as progress:
        with run.attempt("single_trait/3"):
            run.wrote(write_json(path, content))

All functions that do the work of a command take a `Run`, and report written files, skips and failures to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tlcapture.runs.display import Display, Progress
from tlcapture.runs.report import Done, RunReport
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written
from tlcapture.storage.remote.roots import check_writable


@dataclass(frozen=True)
class Run:
    """The `layout` of the experiment, the `report` of what was done, and the `display` that shows messages."""

    layout: Layout
    report: RunReport
    display: Display

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", self.layout.for_run())

    @classmethod
    def begin(cls, layout: Layout, display: Display) -> Run:
        """Start a run in an experiment; the display decides which kind of report it has.

        Raises `StorageError` if the experiment cannot be written to.
        """
        doubt = check_writable(layout.folder)
        run = cls(layout, display.report(layout), display)
        if doubt:
            run.warn(doubt)
        return run

    @classmethod
    def silent(cls, layout: Layout) -> Run:
        """A run that shows nothing and leaves no record."""
        return cls(layout, RunReport(layout.folder), Display())

    def line(self, text: str) -> None:
        """Show a message."""
        self.display.line(text)

    def warn(self, text: str) -> None:
        """Show a warning and keep it in the report, once."""
        if text not in self.report.warnings:
            self.report.warnings.append(text)
            self.display.warn(text)

    def progress(self, total: int, label: str, unit: str) -> AbstractContextManager[Progress]:
        """Show the progress of work of `total` units."""
        return self.display.progress(total, label, unit)

    def wrote(self, written: Written) -> None:
        """Count a file that was written."""
        self.report.wrote(written)

    def removed(self, paths: list[Path]) -> None:
        """Count the removed files that were not written again."""
        self.report.n_removed += sum(not path.exists() for path in paths)

    def failed(self, what: str, reason: object) -> None:
        """Count a prompt or trait that failed, by its name."""
        self.report.failed(what, reason)

    def again(self, worker: str, what: str) -> None:
        """Report that a worker died and that its batch of work is run again."""
        self.report.retried.append(what)
        self.line(f"{worker} died; its batch is run again: {what}")

    def attempt(self, what: str) -> AbstractContextManager[None]:
        """Report a `TlcaptureError` as a failure and continue, except for `NoSpaceError`, which ends the run."""
        return self.report.attempt(what)

    def add(self, done: Done) -> None:
        """Add the work of a worker in another process, and show its warnings."""
        for text in done.warnings:
            self.warn(text)
        self.report.add(done)
