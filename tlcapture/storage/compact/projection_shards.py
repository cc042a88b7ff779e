"""Projections of several prompts onto several traits in one safetensors file: a shard, with an index of its prompts.

    folder/{id}.safetensors       of one prompt, as it is written
    folder/+/{n}.safetensors      of several, which `merge_shards` puts together

`scores` is `[n_tokens, n_traits, n_layers, n_points]`, NaN where there is none; `velocity` and `acceleration` are
`[n_tokens, n_traits]`; all are float32 with the 6 digits of the JSON form. The tokens are those of all prompts, one
prompt after another. `records` are bytes: for each prompt the JSON of everything else in its projection
files. The index (`content` of the metadata) names the axes, and says where the tokens and the record of each prompt
are. `shard_writing` writes them. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tlcapture.errors import StorageError
from tlcapture.names import COMPACT, is_safe_name
from tlcapture.storage.compact.compact_files import open_compact
from tlcapture.storage.compact.safetensors_files import TensorFile
from tlcapture.storage.folders import stems_in
from tlcapture.storage.remote.roots import local
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_significant
from tlcapture.storage.validation import Count, FileContent, Layer, checked, not_valid

# The beginning of a record as `shard_writing` writes it.
_TEXT_FIRST = re.compile(rb'\{"shared":\{"prompt":\{"text":("[^"\\]*(?:\\.[^"\\]*)*")', re.DOTALL)
KIND = "projections"
NUMBERS = "6 significant digits"
STEPS = ("velocity", "acceleration")
MERGED = "+"  # the folder of shards of several prompts; no prompt set or prompt has this name
_MOST_LAYERS = 1000


class IndexEntry(FileContent):
    """A prompt in a shard: its rows among the tokens, its bytes among the records, when each trait was written."""

    id: str
    rows: list[Count] = Field(min_length=2, max_length=2)
    record: list[Count] = Field(min_length=2, max_length=2)
    written: dict[str, Count] = Field(min_length=1)  # by trait, in nanoseconds since the epoch


class Index(FileContent):
    """The index of a shard: the names along its axes, and its prompts."""

    traits: list[str] = Field(min_length=1)
    layers: list[Layer] = Field(min_length=1)
    points: list[str] = Field(min_length=1)
    prompts: list[IndexEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _accounts_for_every_row(self) -> Index:
        for name in ("rows", "record"):
            end = 0
            for entry in self.prompts:
                start, stop = getattr(entry, name)
                if start != end or stop < start:
                    raise ValueError(f"{name} of prompt {entry.id[:80]!r}: {start} to {stop}, but {end} comes next")
                end = stop
        for axis in (self.traits, self.layers, self.points, [entry.id for entry in self.prompts]):
            if len(set(axis)) < len(axis):
                raise ValueError("a name occurs twice along an axis")
        traits = set(self.traits)
        if not all(map(is_safe_name, (part for trait in traits for part in _parts(trait)))):
            raise ValueError("traits: expected names such as category/name")
        for entry in self.prompts:
            if not is_safe_name(entry.id):
                raise ValueError(f"prompt {entry.id[:80]!r}: not a name of a file")
            if not entry.written.keys() <= traits:
                raise ValueError(f"prompt {entry.id[:80]!r} has traits that the axis does not have")
        return self


def _parts(trait: str) -> tuple[str, str]:
    category, _, name = trait.partition("/")
    return category, name


@dataclass(frozen=True)
class ShardedProjection:
    """A prompt's projection onto a trait in a shard."""

    path: Path
    prompt_id: str
    trait: str
    written_ns: int

    def content(self, *, scored: bool = True) -> dict[str, Any]:
        """The content of the equivalent projection file; raises `StorageError` if the shard is damaged.

        Unless `scored`, without scores, velocity and acceleration.
        """
        return Shard.open(self.path).content(self.prompt_id, self.trait, scored=scored)


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard, whose tensors are read when they are used."""

    file: TensorFile
    index: Index

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Open a shard, whose index and tensors are checked; raises `StorageError` for any other file."""
        try:
            # `local`, since in a remote root, the empty file that stands for this one may share its inode with others.
            state = local(path).stat()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        return _opened(path, state.st_mtime_ns, state.st_size, state.st_ino)

    @cached_property
    def entries(self) -> Mapping[str, IndexEntry]:
        """The entries of the prompts by id."""
        return {entry.id: entry for entry in self.index.prompts}

    def _array(self, name: str) -> NDArray[Any]:
        return _mapped(self.file, name)

    def sharded(self, prompt_id: str) -> Iterator[ShardedProjection]:
        """The projections of a prompt; empty for a prompt that the shard does not have."""
        entry = self.entries.get(prompt_id)
        if entry is not None:
            for trait, written in entry.written.items():
                yield ShardedProjection(self.file.path, prompt_id, trait, written)

    def content(self, prompt_id: str, trait: str, *, scored: bool = True) -> dict[str, Any]:
        """The content of the equivalent projection file, as `ShardedProjection.content`."""
        try:
            entry = self.entries[prompt_id]
            start, stop = entry.record
            record = orjson.loads(self._array("records")[start:stop].tobytes())
            own = dict(record["traits"][trait])
            form = own.pop("form")
            if not scored:
                return {**record["shared"], **own}
            scores = _by_layer(self._scores(entry, trait, form), form["layers"], form["n_layers"])
            n_prompt = form["n_prompt_rows"]
            found = {
                **record["shared"],
                **own,
                "projections": {"prompt": scores[:n_prompt], "response": scores[n_prompt:]},
            }
            if "dynamics" in own:
                steps = {name: self._steps(name, entry, trait, form[name]) for name in STEPS if name in form}
                found["dynamics"] = {**own["dynamics"], **steps}
            return found
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            what = f"its record of prompt {prompt_id!r} and {trait} is damaged"
            raise not_valid(self.file.path, KIND, what) from None

    def labels(self, entry: IndexEntry) -> dict[str, dict[str, Any]]:
        """The content of a prompt's projection files without numbers, by trait; raises like `content`."""
        try:
            record = orjson.loads(self._array("records")[slice(*entry.record)].tobytes())
            return {trait: {**record["shared"], **record["traits"][trait]} for trait in entry.written}
        except (KeyError, TypeError, ValueError):
            raise not_valid(self.file.path, KIND, f"its record of prompt {entry.id!r} is damaged") from None

    def texts(self) -> dict[str, str]:
        """The texts of its prompts by id; damaged records are left out."""
        found, records = dict[str, str](), self._array("records").data
        for entry in self.index.prompts:
            record = records[slice(*entry.record)]
            first = _TEXT_FIRST.match(record)  # a hundred times faster than to parse all of it
            with suppress(KeyError, TypeError, ValueError):
                text = orjson.loads(first[1]) if first else orjson.loads(record)["shared"]["prompt"]["text"]
                found[entry.id] = str(text)
        return found

    def _scores(self, entry: IndexEntry, trait: str, form: Mapping[str, Any]) -> NDArray[np.float64]:
        """`[n_rows, n_layers, n_points]`, of the tokens, layers and points that the projection has."""
        rows = np.array(form["rows"], dtype=np.int64) + entry.rows[0]
        if len(rows) and not (entry.rows[0] <= rows[0] and rows[-1] < entry.rows[1] and (np.diff(rows) > 0).all()):
            raise ValueError
        layers = np.array([self.index.layers.index(layer) for layer in form["layers"]], dtype=np.int64)
        points = np.array([self.index.points.index(point) for point in form["points"]], dtype=np.int64)
        column = self.index.traits.index(trait)
        return _rounded(self._array("scores")[:, column][np.ix_(rows, layers, points)])

    def _steps(self, name: str, entry: IndexEntry, trait: str, count: int) -> list[float | None]:
        start, stop = entry.rows
        values = self._array(name)[start:stop, self.index.traits.index(trait)][:count]
        known = ~np.isnan(values)
        found = np.full(len(values), None, dtype=object)
        found[known] = _rounded(values[known])
        return list(found.tolist())


@lru_cache(maxsize=64)  # each has a file descriptor
def _mapped(file: TensorFile, name: str) -> NDArray[Any]:
    """A tensor of an open file, mapped into memory."""
    return file.array(name).view(np.ndarray)


@lru_cache(maxsize=1024)
def _opened(path: Path, *_state: int) -> Shard:
    """An open shard; kept until the file changes."""
    file, content = open_compact(path, KIND)
    index = checked(Index, content, path, KIND)
    n_rows, n_record = index.prompts[-1].rows[1], index.prompts[-1].record[1]
    file.check("scores", "F32", (n_rows, len(index.traits), len(index.layers), len(index.points)))
    for name in STEPS:
        file.check(name, "F32", (n_rows, len(index.traits)))
    file.check("records", "U8", (n_record,))
    return Shard(file, index)


def shard_of_prompt(folder: Path, prompt_id: str) -> Path:
    """The shard of a prompt alone, whether it exists or not."""
    return folder / f"{prompt_id}{COMPACT}"


def merged_shards(folder: Path) -> list[Path]:
    """The shards of several prompts in a folder."""
    return _shards_in(folder / MERGED)


def single_shards(folder: Path) -> list[Path]:
    """The shards of one prompt each in a folder."""
    return _shards_in(folder)


def _shards_in(folder: Path) -> list[Path]:
    return [folder / f"{name}{COMPACT}" for name in sorted(stems_in(folder, COMPACT)) if not name.startswith(".")]


def sharded_of(folder: Path, prompt_id: str) -> dict[str, ShardedProjection]:
    """A prompt's projections in the shards of a folder, the newest one for each trait.

    Raises `StorageError` for a shard that cannot be read and may hold them.
    """
    found: dict[str, ShardedProjection] = {}
    own = shard_of_prompt(folder, prompt_id)
    for path in [*merged_shards(folder), *([own] if lexists(own) else [])]:
        for each in Shard.open(path).sharded(prompt_id):
            if each.trait not in found or found[each.trait].written_ns <= each.written_ns:
                found[each.trait] = each
    return found


def is_sharded(folder: Path, prompt_id: str) -> bool:
    """Whether a prompt has projections in the shards of a folder; damaged shards are left out."""
    paths = [shard_of_prompt(folder, prompt_id), *merged_shards(folder)]
    return any(prompt_id in shard.entries for shard in readable_shards(paths))


def sharded_prompts(folder: Path) -> set[str]:
    """The prompts that have projections in the shards of a folder; damaged shards are left out."""
    return {prompt_id for shard in _shards_of(folder) for prompt_id in shard.entries}


def traits_in_shards(folder: Path) -> set[str]:
    """The traits that prompts are projected onto in the shards of a folder; damaged shards are left out."""
    return {trait for shard in _shards_of(folder) for trait in shard.index.traits}


def readable_shards(paths: Iterable[Path]) -> Iterator[Shard]:
    """The shards at some paths, opened one after another; damaged and missing ones are left out."""
    for path in paths:
        with suppress(StorageError):
            yield Shard.open(path)


def _shards_of(folder: Path) -> Iterator[Shard]:
    return readable_shards([*merged_shards(folder), *single_shards(folder)])


def sharded_texts(folder: Path) -> dict[str, str]:
    """The text of each prompt in the shards of a folder; damaged shards are left out."""
    found: dict[str, str] = {}
    for shard in _shards_of(folder):
        with suppress(StorageError):
            found |= shard.texts()
    return found


def _rounded(values: NDArray[Any]) -> NDArray[np.float64]:
    """The doubles of the JSON form; raises `ValueError` for NaN or inf."""
    if not np.isfinite(values).all():
        raise ValueError
    return round_significant(values, PROJECTION_DIGITS)


def _by_layer(scores: NDArray[np.float64], layers: Sequence[int], n_layers: int) -> list[list[Any]]:
    """`[n_rows][n_layers][n_points]`, with null in place of the layers that were not kept."""
    if not 0 < n_layers <= _MOST_LAYERS or any(not 0 <= layer < n_layers for layer in layers):
        raise ValueError
    rows: list[list[Any]] = scores.tolist()
    if len(layers) == n_layers:
        return rows
    found = []
    for row in rows:
        spread: list[Any] = [None] * n_layers
        for layer, points in zip(layers, row, strict=True):
            spread[layer] = points
        found.append(spread)
    return found
