"""The names of folders in messages: a working copy of a remote root is called by the root's URL."""

from __future__ import annotations

_names: dict[str, str] = {}


def name_folder(folder: str, name: str) -> None:
    """Call a folder by a name in all messages."""
    _names[folder] = name


def named(text: str) -> str:
    """A text with the names of folders in place of their paths."""
    for folder, name in _names.items():
        text = text.replace(folder, name)
    return text
