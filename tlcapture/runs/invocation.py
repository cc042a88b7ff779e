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
            "command_line": _as_text(self.command_line),
            "arguments": {name: _as_text(value) for name, value in self.arguments.items()},
            "started": self.began.isoformat(timespec="seconds"),
        }


def _as_text(value: Any) -> Any:
    """A word that a file can hold: bytes of a command line that are no UTF-8 are written as `\\udc80` and so on."""
    if isinstance(value, list | tuple):
        return [_as_text(each) for each in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
