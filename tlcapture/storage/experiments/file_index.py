"""An index of facts about the files of a capture set, so that they need not be opened.

    index = FileIndex(layout, "s")
    index.known(path, state)          # the facts, unless the file has changed since
    remember(layout, {path: Learned(state, facts)})

The index of a set, `.locks/files-of-{set}.index`, holds size and times of each file and the facts found in it. It is
only a cache: a file that changed, was replaced or removed is not known, and neither is any file if the index is missing
or damaged. Facts are JSON values (parts), many of them shared by several files. The first line is a digest of the rest:

    {"version", "parts": [...], "folders": {folder: {name: [size, mtime_ns, ctime_ns, number of a part, ...]}}}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from os.path import split
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import orjson

from tlcapture.errors import StorageError
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState, write_bytes
from tlcapture.storage.folders import names_in
from tlcapture.storage.json_text import kept_json
from tlcapture.storage.locks import locked
from tlcapture.storage.remote.roots import local

_log = logging.getLogger(__name__)
_VERSION = 1
_N_STATE = len(FileState._fields)
_DEPTHS = {("inference", "raw"): 3, ("analysis", "per_token"): 2, ("analysis", "projections"): 3}

Facts = tuple[bytes, ...]  # parts, each as JSON


class Learned(NamedTuple):
    """The facts found in a file, and its state before it was read."""

    state: FileState
    facts: Facts


Learn = Callable[[Path, Learned], object]


def as_facts(*parts: Any) -> Facts | None:
    """Parts as an index holds them; `None` if JSON does not hold them exactly."""
    found = []
    for part in parts:
        try:
            data = kept_json(part)
        except (TypeError, ValueError):  # also `orjson.JSONEncodeError`
            return None
        if orjson.loads(data) != part:
            return None
        found.append(data)
    return tuple(found)


def capture_set_of(layout: Layout, path: Path) -> str | None:
    """The set that a file of a capture, or a shard, belongs to; `None` for any other path."""
    with suppress(ValueError):
        *folders, _ = path.relative_to(layout.folder).parts
        first, second = (*folders, "", "")[:2]
        depth = _DEPTHS.get((first, second), 4 if first == "inference" else len(folders))
        return "/".join(part for part in folders[depth:] if part != "+") or None
    return None


class FileIndex:
    """The index of a capture set, as it was when it was read."""

    def __init__(self, layout: Layout, capture_set: str):
        self._folder = layout.folder
        table = _read(_path(layout, capture_set))
        self._parts, self._folders = table["parts"], table["folders"]

    @property
    def n_prompts(self) -> int:
        """About how many prompts it knows: the files of the folder with most of them."""
        return max(map(len, self._folders.values()), default=0)

    def known(self, path: Path, state: FileState) -> tuple[Any, ...] | None:
        """The facts of a file in this state, as values; `None` if they are unknown."""
        entry = self._folders.get(_below(self._folder, path.parent), {}).get(path.name)
        if not isinstance(entry, list) or len(entry) <= _N_STATE or tuple(entry[:_N_STATE]) != state:
            return None
        try:
            return tuple(self._parts[number] for number in entry[_N_STATE:])
        except (IndexError, TypeError):
            return None


def remember(layout: Layout, learned: Mapping[Path, Learned]) -> None:
    """Add facts about files to the indices of their sets, and drop files that are gone.

    The index of a set is written whole or not at all. If that fails, the files are checked again when it is needed.
    """
    by_folder: dict[str, dict[str, Learned]] = {}
    for path, each in learned.items():
        folder, name = split(path)
        by_folder.setdefault(folder, {})[name] = each
    by_set: dict[str, dict[str, dict[str, Learned]]] = {}
    for folder, files in by_folder.items():
        if (capture_set := capture_set_of(layout, Path(folder, next(iter(files))))) is not None:
            by_set.setdefault(capture_set, {})[folder] = files
    for capture_set, found in by_set.items():
        try:
            with locked(layout.lock(f"files-of-{capture_set}")):
                path = _path(layout, capture_set)
                write_bytes(path, _extended(layout.folder, _read(path), found))
        except StorageError as error:
            _log.info("not remembered: %s", error)


def _path(layout: Layout, capture_set: str) -> Path:
    return layout.lock(f"files-of-{capture_set}").with_suffix(".index")


def _below(folder: Path, path: Path) -> str:
    return str(path)[len(str(folder)) + 1 :]


def _read(path: Path) -> dict[str, Any]:
    """The content of an index; an empty one for a file that is missing or is not an index."""
    with suppress(OSError):
        found = path.stat()
        if S_ISREG(found.st_mode):  # reading a pipe would wait
            return _loaded(path, FileState.of(found))
    return _table(None)


@lru_cache(maxsize=4)
def _loaded(path: Path, _state: FileState) -> dict[str, Any]:
    try:
        digest, _, content = local(path).read_bytes().partition(b"\n")
        return _table(orjson.loads(content) if digest == _digest(content) else None)
    except (OSError, ValueError, RecursionError):
        return _table(None)


def _table(value: Any) -> dict[str, Any]:
    is_index = isinstance(value, dict) and value.get("version") == _VERSION
    parts, folders = (value.get("parts"), value.get("folders")) if is_index else (None, None)
    if (
        isinstance(parts, list)
        and isinstance(folders, dict)
        and all(isinstance(each, dict) for each in folders.values())
    ):
        return {"parts": parts, "folders": folders}
    return {"parts": [], "folders": {}}


def _extended(folder: Path, table: Mapping[str, Any], learned: Mapping[str, Mapping[str, Learned]]) -> bytes:
    """The content of an index with more files, by folder and name, and without those that are gone."""
    numbers: dict[bytes, int] = {}
    parts = [kept_json(part) for part in table["parts"]]
    folders: dict[str, dict[str, list[int]]] = {}

    def entry(state: Iterable[int], facts: Iterable[bytes]) -> list[int]:
        return [*state, *(numbers.setdefault(part, len(numbers)) for part in facts)]

    for name, files in table["folders"].items():
        for file in names_in(folder / name) & files.keys():
            with suppress(TypeError, IndexError):  # it is damaged
                facts = [parts[number] for number in files[file][_N_STATE:]]
                folders.setdefault(name, {})[file] = entry(files[file][:_N_STATE], facts)
    for place, new in learned.items():
        present = names_in(Path(place))
        known = {file: entry(each.state, each.facts) for file, each in new.items() if file in present}
        folders.setdefault(_below(folder, Path(place)), {}).update(known)
    whole = {"version": _VERSION, "parts": [orjson.Fragment(part) for part in numbers], "folders": folders}
    content = orjson.dumps(whole)
    return _digest(content) + b"\n" + content


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).hexdigest().encode()
