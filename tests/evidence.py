"""Collect test results for docs/reliability.md, which `make reliability` writes.

A test adds a row after its assertions have passed, so each row of the page is a test that passed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests import reliability_page


@dataclass
class Evidence:
    """The rows of the page, collected during a test session."""

    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    inputs: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    deviations: dict[tuple[str, str, str], float] = field(default_factory=dict)
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)
    noise: dict[tuple[str, str], dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def survived(self, fault: str, how: str, outcome: str) -> None:
        """Add an injected fault, how it was injected, and the outcome."""
        self.faults[fault] = (how, outcome)

    def tried(self, reader: str, kind: str, count: int = 1) -> None:
        """Add inputs of one kind (`truncated`, `wrong types` ...) that a reader refused or read correctly."""
        self.inputs[reader, kind] += count

    def deviated(self, architecture: str, engine: str, what: str, value: float) -> None:
        """Add the relative deviation of `what` (`prompt`, `decode` ...) from Hugging Face; the largest one is kept."""
        key = (architecture, engine, what)
        self.deviations[key] = max(value, self.deviations.get(key, 0.0))

    def refused(self, architecture: str, engine: str, reason: str) -> None:
        """Add an engine that refuses an architecture, with the reason in its error."""
        self.refusals[architecture, engine] = reason

    def found_in_noise(self, finding: str, null: str, kind: str, share: float) -> None:
        """Add how often something is shown as a finding in one kind of noise, and what it is compared with."""
        self.noise[finding, null][kind] = share

    def write(self, path: Path) -> None:
        """Write the page to `path`."""
        path.write_text(reliability_page.page(self), encoding="utf-8")
