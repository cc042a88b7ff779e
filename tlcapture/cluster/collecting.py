"""Files of workers that do not see the experiment: those they are sent, and storing those they send back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import is_alike
from tlcapture.runs.report import Done
from tlcapture.storage.config import update_config
from tlcapture.storage.files import Written, read_bytes, remove, write_bytes
from tlcapture.storage.layout import Layout, derived_files

_INPUTS = (
    "config.json",
    "extraction/extraction_evaluation.json",
    "extraction/*/*/vectors/*",
    "steering/*/*/results.json",
)


def experiment_inputs(layouts: Iterable[Layout]) -> dict[str, bytes]:
    """What workers read of experiments (config, vectors and their scores), by path relative to the root."""
    found: dict[str, bytes] = {}
    for layout in layouts:
        found |= file_contents(layout, [path for pattern in _INPUTS for path in layout.folder.glob(pattern)])
    return found


def file_contents(layout: Layout, paths: Sequence[Path]) -> dict[str, bytes]:
    """The content of those of the files that exist, by path relative to the root."""
    return {path.relative_to(layout.root).as_posix(): read_bytes(path) for path in paths if path.is_file()}


def store_outputs(layout: Layout, files: Mapping[str, bytes], done: Done) -> Done:
    """Write a worker's files to where a local run would have written them.

    Args:
        files: content by path relative to the root.
        done: what the worker did.

    Returns:
        What the worker did, with the files as they were written here.
    """
    raw = [name for name in files if "/inference/raw/residual/" in name]
    others = [name for name in files if name not in raw and not name.endswith("/config.json")]
    markers = [layout.unfinished(*_prompt(layout.root / name)) for name in raw]
    for marker in markers:
        write_bytes(marker, b"")
    written = [_store_capture(layout, layout.root / name, files[name]) for name in raw]
    written += [write_bytes(layout.root / name, files[name]) for name in others]
    remove(markers)
    return replace(done, written=written)


def _store_capture(layout: Layout, path: Path, content: bytes) -> Written:
    """Write a raw residual file, after removing files derived from another capture of the prompt."""

    def remove_derived(new: Path) -> None:
        capture = Capture.open(new)
        update_config(layout, inference_model=str(capture.metadata["inference_model"]))
        if not is_alike(path, capture):
            remove(derived_files(layout, *_prompt(path)))

    return write_bytes(path, content, before_replacing=remove_derived)


def _prompt(path: Path) -> tuple[str, str]:
    """Prompt set and id of a raw residual file."""
    return path.parent.name, path.stem
