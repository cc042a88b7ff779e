"""What a run says while it goes. Loads next to nothing."""

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
        """Count `units` (tokens, examples), and say what was `done` with them.

        Runs call it where they can be stopped: what was begun is whole, or can be thrown away.
        """

    def state(self, text: str) -> None:
        """What is in hand just now, where there is a place that shows it for as long as it is true."""


class Reporter:
    """Where a run's lines and progress go; this one keeps quiet. The command line has another."""

    def line(self, text: str) -> None:
        """Something worth a line."""

    def warn(self, text: str) -> None:
        """Something the user should know before believing the numbers."""

    def uses(self, **facts: Any) -> None:
        """What a run works with that its options do not say: the model that was loaded."""

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        """Show how far a piece of work of `total` units is."""
        yield Progress()

    def report(self, layout: Layout) -> RunReport:
        """The report of a run in an experiment, which is about to begin."""
        from tlcapture.runs.report import RunReport

        return RunReport(layout.folder)
