"""Finding experiments in Python. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from tlcapture.errors import InputError
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.remote.object_stores import is_url
from tlcapture.storage.remote.roots import root_folder


def default_root() -> Path:
    """`TLCAPTURE_ROOT`, or the current folder."""
    return root_folder(os.environ.get("TLCAPTURE_ROOT") or ".")


def layout_of(target: Any) -> Layout:
    """The layout of an experiment, given as an object, name or folder; raises `InputError` for anything else."""
    if isinstance(getattr(target, "layout", None), Layout):
        return cast(Layout, target.layout)
    if not isinstance(target, str | Path):
        raise InputError(f"expected an Experiment, its name or its folder, got {type(target).__name__}")
    path = _path_of(target)
    if isinstance(target, str) and len(path.parts) == 1:
        return Layout(default_root(), target)
    if path.parent.name != "experiments":
        raise InputError(f"{path}: not the folder of an experiment: expected .../experiments/NAME, or its name")
    return Layout(path.parent.parent, path.name)


def _path_of(target: str | Path) -> Path:
    """The path of an experiment's folder; for a URL, the path in the working copy of its root."""
    if not is_url(target):
        return root_folder(target)
    root, experiments, name = str(target).rstrip("/").rpartition("/experiments/")
    if not experiments or "/" in name:
        raise InputError(f"{target}: not the folder of an experiment: expected .../experiments/NAME")
    return root_folder(root) / "experiments" / name
