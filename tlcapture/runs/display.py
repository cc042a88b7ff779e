"""What a run shows while it works: messages, warnings, progress. Loads next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcapture.runs.report import RunReport
    from tlcapture.storage.layout import Layout


class Progress:
    """A count that goes up; this one shows nothing."""

    def advance(self, units: int = 0, *, done: str | None = None) -> None:
        """Count `units` (tokens, examples), and report what was `done` with them.

        Runs call it at points where they can be stopped: what was begun is complete, or can be discarded.
        """

    def state(self, text: str) -> None:
        """Show what is being worked on, for as long as it is."""


class Display:
    """Where a run's messages and progress go; this one is silent. The command line has another."""

    def line(self, text: str) -> None:
        """Show a message."""

    def warn(self, text: str) -> None:
        """Show what the user should know before trusting the numbers."""

    def uses(self, **facts: Any) -> None:
        """Take note of what a run uses that its options do not name, such as the model that was loaded."""

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        """Show the progress of work of `total` units."""
        yield Progress()

    def report(self, layout: Layout) -> RunReport:
        """The report of a run in an experiment, which is about to begin."""
        from tlcapture.runs.report import RunReport

        return RunReport(layout.folder)
