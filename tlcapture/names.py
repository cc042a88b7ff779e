"""Names from outside that become parts of paths: experiments, prompt sets, prompt ids, traits.

A safe name can only mean a file directly inside the folder it is joined to: letters, digits, `.`, `_` and
`-`, not starting with `.` or `-`, at most 128 characters.

    >>> check_name("single_trait", "prompt set")
    'single_trait'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tlcapture.errors import InputError

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def is_safe_name(name: str) -> bool:
    """Whether `name` is safe as a single path component."""
    return _SAFE.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """Return `name`, or raise `InputError` for an unsafe one; `what` is the kind of name, for the message."""
    if not isinstance(name, str) or not is_safe_name(name):
        raise InputError(
            f"{what} {name!r} is not a safe file name: use letters, digits, '.', '_' and '-' "
            "(at most 128, not starting with '.' or '-')"
        )
    return name


@dataclass(frozen=True, order=True)
class Trait:
    """A trait, `category/name`, for example `behavioral/refusal`."""

    category: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Trait:
        """Read `category/name`; raises `InputError` for anything else."""
        parts = text.strip().split("/")
        if len(parts) != 2 or not all(is_safe_name(part) for part in parts):
            raise InputError(f"trait {text!r} is not of the form category/name, for example behavioral/refusal")
        if parts[0] == "raw":
            raise InputError(f"trait {text!r}: the category 'raw' is reserved for the folder of captures")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.category}/{self.name}"


def split_names(text: str | None) -> list[str]:
    """Split a comma-separated option into its parts, without empty ones."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
