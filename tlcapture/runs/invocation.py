"""A command as it was called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any


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
            "command_line": self.command_line,
            "arguments": dict(self.arguments),
            "started": self.began.isoformat(timespec="seconds"),
        }
