"""Command lines in messages, as they can be typed in the current folder. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.remote.object_stores import checked_url, is_url
from tlcapture.storage.remote.roots import shown
from tlcapture.text import shell_join


def command_line(layout: Layout, name: str, *options: str) -> str:
    """The command line of a command for an experiment, with `--root` unless that is the default.

    >>> command_line(Layout(Path("/data"), "my_exp"), "project", "--prompt-set", "short")
    'tlcapture project --experiment my_exp --root /data --prompt-set short'
    """
    words = ["tlcapture", *name.split(), "--experiment", layout.experiment]
    return shell_join([*words, *root_words(layout.root), *options])


def root_words(root: Path) -> list[str]:
    """The option by which a command finds a root; none for the default root."""
    return [] if _is_default(root) else ["--root", shown(root)]


def _is_default(root: Path) -> bool:
    default, here = os.environ.get("TLCAPTURE_ROOT") or ".", shown(root)
    if is_url(default) or is_url(here):
        return is_url(default) and is_url(here) and checked_url(default) == checked_url(here)
    try:
        return root.resolve() == Path(default).expanduser().resolve()
    except RuntimeError:  # of an unknown user
        return False
