"""One run at a time: of two that would write the same files, the second waits and says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tlcapture.layout import Layout
from tlcapture.locks import locked
from tlcapture.runs.report import Reporter


@contextmanager
def alone(layout: Layout, what: str, reporter: Reporter) -> Iterator[bool]:
    """Be the only run that writes `what` (say, `captures of single_trait`); yields whether it had to wait."""

    def say() -> None:
        reporter.line(f"another run is writing {what} in {layout.experiment}: waiting for its end")

    with locked(layout.lock(what.replace(" ", "-")), say) as waited:
        yield waited
