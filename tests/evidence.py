"""What tests saw, gathered into docs/reliability.md: `make reliability` runs them and writes it.

A test hands over a row when its own assertions hold; a row in the document is a test that passed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests import reliability_page


@dataclass
class Evidence:
    """Rows of the document, kept for as long as the tests run."""

    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    inputs: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    deviations: dict[tuple[str, str, str], float] = field(default_factory=dict)
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)

    def survived(self, fault: str, how: str, outcome: str) -> None:
        """A fault that was injected, how, and what was left afterwards."""
        self.faults[fault] = (how, outcome)

    def tried(self, reader: str, kind: str, count: int = 1) -> None:
        """Inputs of a kind (`truncated`, `wrong types` ...) that a reader refused or read rightly."""
        self.inputs[reader, kind] += count

    def deviated(self, architecture: str, engine: str, what: str, value: float) -> None:
        """The relative deviation from Hugging Face of `what` (`prompt`, `decode` ...); the largest is kept."""
        key = (architecture, engine, what)
        self.deviations[key] = max(value, self.deviations.get(key, 0.0))

    def refused(self, architecture: str, engine: str, reason: str) -> None:
        """An engine that does not run an architecture, and the reason it gives."""
        self.refusals[architecture, engine] = reason

    def write(self, path: Path) -> None:
        path.write_text(reliability_page.page(self), encoding="utf-8")
