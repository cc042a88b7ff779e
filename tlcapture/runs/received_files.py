"""Files of workers that do not see the experiment: sending their inputs, and storing the files that they send back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import is_alike
from tlcapture.errors import StorageError
from tlcapture.names import COMPACT, Trait
from tlcapture.runs.existing_files import check_replaceable, remove_derived
from tlcapture.runs.report import Done, Failed
from tlcapture.storage.compact.shard_writing import adopt, take_out
from tlcapture.storage.experiments.config import update_config
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.storage.experiments.projection_places import STREAM_FOLDERS, place_of_projection
from tlcapture.storage.files import Written, read_bytes, remove, write_bytes

_INPUTS = (
    "config.json",
    "extraction/extraction_evaluation.json",
    "extraction/*reference.pt",
    "extraction/*/*/vectors/*",
    "steering/*/*/results.json",
)


def experiment_inputs(layouts: Iterable[Layout]) -> dict[str, bytes]:
    """The files of experiments that workers read (config, vectors and their scores), by path relative to the root."""
    found: dict[str, bytes] = {}
    for layout in layouts:
        found |= file_contents(layout, [path for pattern in _INPUTS for path in layout.folder.glob(pattern)])
    return found


def file_contents(layout: Layout, paths: Sequence[Path]) -> dict[str, bytes]:
    """The content of the files that exist, by path relative to the root."""
    return {path.relative_to(layout.root).as_posix(): read_bytes(path) for path in paths if path.is_file()}


def store_outputs(layout: Layout, files: Mapping[str, bytes], done: Done, overwrite: bool = True) -> Done:
    """Write a worker's files to where a local run would have written them.

    Args:
        files: content by path relative to the root.
        done: the worker's report.
        overwrite: replace files that cannot be read, too; otherwise they are kept, and added to the failures.

    Returns:
        The worker's report, with the files as they were written here.
    """
    failures = [] if overwrite else _not_replaceable(layout, files)
    kept = {failed.what for failed in failures}
    files = {name: content for name, content in files.items() if name not in kept}
    raw = [name for name in files if "/inference/raw/residual/" in name]
    others = [name for name in files if name not in raw and not name.endswith("/config.json")]
    markers = [layout.unfinished(*layout.of_residual(layout.root / name)) for name in raw]
    for marker in markers:
        write_bytes(marker, b"")
    written = [_store_capture(layout, layout.root / name, files[name]) for name in raw]
    written += [_store(layout, layout.root / name, files[name]) for name in others]
    _take_out_of_shards(layout, [layout.root / name for name in others])
    remove(markers)
    return replace(done, written=written, failures=[*done.failures, *failures])


def _not_replaceable(layout: Layout, files: Mapping[str, bytes]) -> list[Failed]:
    """The files, by path relative to the root, that would replace or remove one that cannot be read."""
    found = []
    for name in files:
        path = layout.root / name
        if path.suffix not in (".pt", ".json", COMPACT) or path.name == "config.json":
            continue
        others = derived_files(layout, *layout.of_residual(path)) if "/inference/raw/residual/" in name else []
        try:
            for each in (path, *others):
                check_replaceable(layout, each)
        except StorageError as error:
            found.append(Failed(name, str(error)))
    return found


def _store(layout: Layout, path: Path, content: bytes) -> Written:
    """Write a file that was made from a capture, and remove its other form."""
    place = path.relative_to(layout.folder).parts
    if place[:2] == ("analysis", "projections"):
        written, traits = adopt(path.parent, path.stem, content)
        component = next(name for name, stream in STREAM_FOLDERS.items() if stream == place[2])
        names = (component, "/".join(place[3:-1]), path.stem)
        remove(layout.projection(Trait.parse(trait), *names) for trait in traits)
        return written
    written = write_bytes(path, content)
    if place[:2] == ("analysis", "per_token"):
        remove(each for each in layout.forms(path.with_suffix(".json")) if each != path)
    return written


def _take_out_of_shards(layout: Layout, paths: Sequence[Path]) -> None:
    """Remove the projections that are JSON files now from shards, of which each is written once."""
    traits: dict[tuple[Path, str], list[str]] = {}
    for path in paths:
        if (found := place_of_projection(path.relative_to(layout.folder))) is not None:
            folder = layout.shards(found.component, found.prompt_set)
            traits.setdefault((folder, path.stem), []).append(str(found.trait))
    for (folder, name), of_prompt in traits.items():
        if folder.is_dir():
            take_out(folder, name, of_prompt)


def _store_capture(layout: Layout, path: Path, content: bytes) -> Written:
    """Write a raw residual file, after removing files derived from another capture of the prompt."""

    def before_replacing(new: Path) -> None:
        capture = Capture.open(new)
        update_config(layout, inference_model=str(capture.metadata["inference_model"]))
        if not is_alike(path, capture):
            remove_derived(layout, *layout.of_residual(path))

    return write_bytes(path, content, before_replacing=before_replacing)
