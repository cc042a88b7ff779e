"""The display of a run while it works: messages, warnings and progress. Imports almost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcapture.runs.report import RunReport
    from tlcapture.storage.experiments.layout import Layout


class Progress:
    """The progress of a run. This base class shows nothing."""

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        """Add `units` (such as tokens or examples) to the progress; `done` is a message about finished work.

        `share` is the share of all work that is done, if the message states it and units are counted later.

        A run calls this only at points where it can be stopped: everything it started is complete or can be discarded.
        An implementation may raise `KeyboardInterrupt` to stop it.
        """

    def state(self, text: str) -> None:
        """Show the current work until the next call."""


class Display:
    """Shows the messages and progress of a run. This base class is silent; the command line has another."""

    def line(self, text: str) -> None:
        """Show a message."""

    def warn(self, text: str) -> None:
        """Show a warning: something to know before relying on the results."""

    def uses(self, **facts: Any) -> None:
        """Record facts about the run that its options do not contain, such as the model that was loaded."""

    def task(self, number: int, n_tasks: int) -> None:
        """Announce that the progress that follows belongs to a task, by its number from 1."""

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        """Show the progress of work of `total` units, such as tokens, under a label."""
        yield Progress()

    def report(self, layout: Layout) -> RunReport:
        """A new report for a run in an experiment."""
        from tlcapture.runs.report import RunReport

        return RunReport(layout.folder)
