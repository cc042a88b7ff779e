"""What a run shows while it works: messages, warnings and progress. Imports almost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcapture.runs.report import RunReport
    from tlcapture.storage.layout import Layout


class Progress:
    """The progress of a run. This base class shows nothing."""

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        """Add `units` (such as tokens or examples) to the progress; `done` is a message about finished work.

        `share` is how much of all work is done, where the message says it and units are counted later.

        A run calls this only where it can be stopped: where everything it started is complete or can be discarded.
        An implementation may raise `KeyboardInterrupt` to stop it.
        """

    def state(self, text: str) -> None:
        """Show what is being worked on, until the next call."""


class Display:
    """Shows the messages and progress of a run. This base class is silent; the command line has another."""

    def line(self, text: str) -> None:
        """Show a message."""

    def warn(self, text: str) -> None:
        """Show a warning: what the user should know before relying on the results."""

    def uses(self, **facts: Any) -> None:
        """Record facts about the run that its options do not contain, such as the model that was loaded."""

    def task(self, number: int, n_tasks: int) -> None:
        """The progress that follows is that of a task, by its number from 1."""

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        """Show the progress of work of `total` units, such as tokens, under a label."""
        yield Progress()

    def report(self, layout: Layout) -> RunReport:
        """A new report for a run in an experiment."""
        from tlcapture.runs.report import RunReport

        return RunReport(layout.folder)
