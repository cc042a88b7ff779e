"""Bytes as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """`1536` as `1.5 KB`, in powers of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
