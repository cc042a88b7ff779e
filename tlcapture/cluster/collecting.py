"""Files of workers that do not see the experiment: what they are given of it, and where theirs are put."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import is_alike
from tlcapture.runs.report import Done
from tlcapture.storage.config import record
from tlcapture.storage.files import Written, read_bytes, remove, write_bytes
from tlcapture.storage.layout import Layout, derived_files

_READ = (
    "config.json",
    "extraction/extraction_evaluation.json",
    "extraction/*/*/vectors/*",
    "steering/*/*/results.json",
)


def given_files(layouts: Iterable[Layout]) -> dict[str, bytes]:
    """What workers read of experiments: config, vectors and their scores, by path below the root."""
    found: dict[str, bytes] = {}
    for layout in layouts:
        found |= contents_of(layout, [path for pattern in _READ for path in layout.folder.glob(pattern)])
    return found


def contents_of(layout: Layout, paths: Sequence[Path]) -> dict[str, bytes]:
    """The files of a task, by path below the root."""
    return {path.relative_to(layout.root).as_posix(): read_bytes(path) for path in paths if path.is_file()}


def place(layout: Layout, files: Mapping[str, bytes], done: Done) -> Done:
    """Put a worker's files where a local run would have put them; returns what was done, in these places."""
    raw = [name for name in files if "/inference/raw/residual/" in name]
    others = [name for name in files if name not in raw and not name.endswith("/config.json")]
    marks = [layout.unfinished(*_prompt(layout.root / name)) for name in raw]
    for mark in marks:
        write_bytes(mark, b"")
    written = [_place_capture(layout, layout.root / name, files[name]) for name in raw]
    written += [write_bytes(layout.root / name, files[name]) for name in others]
    remove(marks)
    return replace(done, written=written)


def _place_capture(layout: Layout, path: Path, content: bytes) -> Written:
    """Put a raw residual file in its place; what was made from another capture of the prompt goes first."""

    def make_way(new: Path) -> None:
        capture = Capture.open(new)
        record(layout, inference_model=str(capture.metadata["inference_model"]))
        if not is_alike(path, capture):
            remove(derived_files(layout, *_prompt(path)))

    return write_bytes(path, content, before_replacing=make_way)


def _prompt(path: Path) -> tuple[str, str]:
    """Prompt set and id of a raw residual file."""
    return path.parent.name, path.stem
