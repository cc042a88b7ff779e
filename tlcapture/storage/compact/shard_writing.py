"""Writing shards of projections: of one prompt when it is projected, and merged ones of several prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tlcapture.errors import StorageError
from tlcapture.names import COMPACT
from tlcapture.storage.compact.compact_files import compact_metadata
from tlcapture.storage.compact.projection_shards import (
    KIND,
    MERGED,
    NUMBERS,
    STEPS,
    IndexEntry,
    Shard,
    ShardedProjection,
    merged_shards,
    readable_shards,
    shard_of_prompt,
    sharded_of,
    single_shards,
)
from tlcapture.storage.compact.safetensors_files import TensorSpec, write_safetensors
from tlcapture.storage.files import Written, remove, write_bytes

MOST_BYTES = 64 * 2**20  # of a shard, unless one prompt has more
_MOST_SMALL = 16  # shards of several prompts that have less than half of that
_POINTS = ("residual_in", "after_attn", "residual_out", "attn_out")  # the order of the last axis

Content = Mapping[str, Any]  # of a projection file
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class _Axes:
    """The names along the axes of a shard."""

    traits: Sequence[str]
    layers: Sequence[int]
    points: Sequence[str]

    @classmethod
    def of(cls, blocks: Sequence[_Block]) -> _Axes:
        """Axes that have room for some blocks."""
        traits = dict.fromkeys(trait for block in blocks for trait in block.axes.traits)
        layers = {layer for block in blocks for layer in block.axes.layers}
        points = {point for block in blocks for point in block.axes.points}
        return cls(sorted(traits), sorted(layers), sorted(points, key=_order_of_point))


def _order_of_point(point: str) -> tuple[int, str]:
    return (_POINTS.index(point) if point in _POINTS else len(_POINTS), point)


@dataclass(frozen=True, eq=False)
class _Block:
    """A prompt's part of a shard; `values` gives one of its tensors, along its own axes."""

    prompt_id: str
    axes: _Axes
    n_rows: int
    record: bytes
    written: Mapping[str, int]
    values: Callable[[str], Numbers]

    def values_along(self, axes: _Axes, name: str) -> Numbers:
        """A tensor along the axes of a shard, with NaN where the prompt has nothing."""
        if axes == self.axes:
            return self.values(name)
        found, along = _empty(name, self.n_rows, axes), [_places(self.axes.traits, axes.traits)]
        if name == "scores":
            along += [_places(self.axes.layers, axes.layers), _places(self.axes.points, axes.points)]
        found[np.ix_(range(self.n_rows), *along)] = self.values(name)
        return found

    @property
    def n_bytes(self) -> int:
        """The bytes it takes in a shard with its own axes."""
        row = len(self.axes.traits) * (len(self.axes.layers) * len(self.axes.points) + len(STEPS))
        return 4 * self.n_rows * row + len(self.record)


def write_prompt(folder: Path, prompt_id: str, contents: Mapping[str, Content], now: int | None = None) -> Written:
    """Write a prompt's projections, given as file contents by trait; projections onto other traits stay.

    `now` is the time to record for them, in nanoseconds since the epoch; `None` means the present time.

    Raises `StorageError` if an existing shard of the prompt cannot be read.
    """
    now = time.time_ns() if now is None else now
    whole, times = dict(contents), dict.fromkeys(contents, now)
    others = [each for trait, each in sharded_of(folder, prompt_id).items() if trait not in contents]
    stored = {each.trait: each.content() for each in others}
    tokens = _tokens(next(iter(contents.values())))
    if all(_tokens(content) == tokens for content in stored.values()):  # otherwise of an earlier capture
        whole, times = {**stored, **whole}, {**{each.trait: each.written_ns for each in others}, **times}
    return _write(shard_of_prompt(folder, prompt_id), [_block(prompt_id, whole, times)])


def adopt(folder: Path, prompt_id: str, shard: bytes) -> tuple[Written, list[str]]:
    """Take over a prompt's projections from a shard that another process wrote; also returns their traits."""
    sent = folder / f".{prompt_id}.sent{COMPACT}"
    write_bytes(sent, shard)
    try:
        found = {each.trait: each.content() for each in Shard.open(sent).sharded(prompt_id)}
        return write_prompt(folder, prompt_id, found), list(found)
    finally:
        remove([sent])


def take_out(folder: Path, prompt_id: str, traits: Iterable[str] | None = None) -> list[Path]:
    """Remove a prompt's projections from the shards of a folder, onto some traits or onto all; returns removed files.

    A shard of several prompts is first divided into one per prompt, so that removing many prompts reads it once. A
    damaged shard of the prompt alone is removed; one of several prompts stays.
    """
    dropped = None if traits is None else set(traits)
    for shard in readable_shards(merged_shards(folder)):
        entry = shard.entries.get(prompt_id)
        if entry is not None and (dropped is None or not dropped.isdisjoint(entry.written)):
            _divide(folder, shard)
    own = shard_of_prompt(folder, prompt_id)
    held = [each for shard in readable_shards([own]) for each in shard.sharded(prompt_id)]
    stay = [each for each in held if dropped is not None and each.trait not in dropped]
    if stay and len(stay) < len(held):
        _write(own, [_block_again(stay)])
    return [] if stay else [own] if remove([own]) else []


def merge_shards(folder: Path) -> list[Written]:
    """Merge the shards of single prompts in a folder into shards of up to `MOST_BYTES`; returns the new ones.

    Small ones that earlier runs made are merged again where there are many, since a prompt is looked for in all shards.

    No other process may write there at the same time. Damaged shards stay. The shard of a prompt is removed once
    the new one is complete, so that nothing is lost when the process ends in between.
    """
    small = [path for path in merged_shards(folder) if path.is_file() and path.stat().st_size < MOST_BYTES // 2]
    _remove_merged(folder)
    if len(small) > _MOST_SMALL and single_shards(folder):
        for shard in readable_shards(small):
            _divide(folder, shard)
    made: list[Written] = []
    together: list[_Block] = []
    n_bytes = 0
    for shard in readable_shards(single_shards(folder)):
        if list(shard.entries) != [shard.file.path.stem] or not shard.file.is_whole():
            continue
        block = _stored_block(shard, shard.index.prompts[0])
        if together and n_bytes + block.n_bytes > MOST_BYTES:
            made += _merged(folder, together)
            together, n_bytes = [], 0
        together.append(block)
        n_bytes += block.n_bytes
    made += _merged(folder, together)
    if made:
        _remove_superseded(folder)
    return made


def _remove_merged(folder: Path) -> None:
    """Remove shards of single prompts that were merged by a run that was killed before it removed them."""
    singles = list(readable_shards(single_shards(folder)))
    newest = _newest(readable_shards(merged_shards(folder))) if singles else {}
    remove(each.file.path for each in singles if all(newest.get(of, -1) >= when for of, when in _written(each)))


def _remove_superseded(folder: Path) -> None:
    """Remove merged shards whose projections all exist in other shards in a newer version."""
    shards = list(readable_shards(merged_shards(folder)))
    newest = _newest(shards)
    remove(each.file.path for each in shards if all(newest[of] > when for of, when in _written(each)))


def _written(shard: Shard) -> Iterator[tuple[tuple[str, str], int]]:
    """When each projection in a shard was written, by prompt and trait."""
    return (((entry.id, trait), when) for entry in shard.index.prompts for trait, when in entry.written.items())


def _newest(shards: Iterable[Shard]) -> dict[tuple[str, str], int]:
    newest: dict[tuple[str, str], int] = {}
    for of, when in (each for shard in shards for each in _written(shard)):
        newest[of] = max(when, newest.get(of, 0))
    return newest


def _merged(folder: Path, blocks: Sequence[_Block]) -> list[Written]:
    if len(blocks) < 2:
        return []
    taken = {path.stem for path in merged_shards(folder)}
    number = next(str(each) for each in range(1, len(taken) + 2) if str(each) not in taken)
    written = _write(folder / MERGED / f"{number}{COMPACT}", blocks)
    remove([shard_of_prompt(folder, block.prompt_id) for block in blocks])
    return [written]


def _divide(folder: Path, shard: Shard) -> None:
    """Divide a merged shard into one per prompt, and remove it; a damaged one stays.

    Newer projections in a prompt's own shard stay.
    """
    blocks = []
    with suppress(StorageError):
        for entry in shard.index.prompts:
            has_own = shard_of_prompt(folder, entry.id).is_file()
            newest = sharded_of(folder, entry.id).values() if has_own else ()
            blocks.append(_block_again(newest) if newest else _stored_block(shard, entry))
    if len(blocks) == len(shard.index.prompts) and shard.file.is_whole():
        for block in blocks:
            _write(shard_of_prompt(folder, block.prompt_id), [block])
        remove([shard.file.path])


def _shared(content: Content) -> dict[str, Any]:
    """The content that a prompt's projections share: its texts and tokens, which may be encoded already (`as_json`)."""
    parts = {name: content[name] for name in ("prompt", "response")}
    return dict(orjson.loads(orjson.dumps(parts)))


def _tokens(content: Content) -> Any:
    return [part["tokens"] for part in _shared(content).values()]


def _block(prompt_id: str, contents: Mapping[str, Content], written: Mapping[str, int]) -> _Block:
    """The projections of a prompt from the contents of its files by trait, which have the same tokens."""
    shared = _shared(next(iter(contents.values())))
    n_prompt, n_tokens = len(shared["prompt"]["tokens"]), sum(len(part["tokens"]) for part in shared.values())
    forms = {trait: _form(content, n_prompt, n_tokens) for trait, content in contents.items()}
    records = {}
    for trait, content in contents.items():
        dynamics = {k: v for k, v in (content.get("dynamics") or {}).items() if k not in forms[trait]}
        others = {k: v for k, v in content.items() if k not in (*shared, "projections", "dynamics")}
        records[trait] = {**others, **({"dynamics": dynamics} if "dynamics" in content else {}), "form": forms[trait]}
    layers = {layer for form in forms.values() for layer in form["layers"]}
    points = {point for form in forms.values() for point in form["points"]}
    axes = _Axes(list(contents), sorted(layers), sorted(points, key=_order_of_point))

    def values(name: str) -> Numbers:
        found = _empty(name, n_tokens, axes)
        for column, (trait, form) in enumerate(forms.items()):
            if name == "scores":
                places = _places(form["layers"], axes.layers), _places(form["points"], axes.points)
                scores = _kept_scores(contents[trait]["projections"], form["layers"])
                if scores.size:
                    found[:, column][np.ix_(form["rows"], *places)] = scores
            elif name in form:
                steps = np.array(contents[trait]["dynamics"][name], dtype=np.float64)  # null becomes NaN
                found[: len(steps), column] = steps
        return found

    record = orjson.dumps({"shared": shared, "traits": records}, option=orjson.OPT_SERIALIZE_NUMPY)
    return _Block(prompt_id, axes, n_tokens, record, dict(written), values)


def _block_again(projections: Collection[ShardedProjection]) -> _Block:
    """The projections of a prompt in shards, to be written to one."""
    contents = {each.trait: each.content() for each in projections}
    return _block(next(iter(projections)).prompt_id, contents, {each.trait: each.written_ns for each in projections})


def _form(content: Content, n_prompt: int, n_tokens: int) -> dict[str, Any]:
    """The rows, layers and points of a projection, and the number of its steps."""
    metadata, dynamics = content["metadata"], content.get("dynamics") or {}
    rows = list(metadata.get("positions", range(n_tokens)))
    parts = [part for part in content["projections"].values() if len(part)]
    return {
        "rows": rows,
        "n_prompt_rows": sum(row < n_prompt for row in rows),
        "n_layers": len(parts[0][0]) if parts else max(metadata["layers"]) + 1,
        "layers": list(metadata["layers"]),
        "points": list(metadata["sublayers"]),
        **{name: len(dynamics[name]) for name in STEPS if dynamics.get(name) is not None},
    }


def _kept_scores(projections: Mapping[str, Any], layers: Sequence[int]) -> Numbers:
    """`[n_rows, n_layers, n_points]` of the kept layers of prompt and response."""
    parts = []
    for part in projections.values():
        if isinstance(part, np.ndarray):
            parts.append(part[:, list(layers)])
        elif len(part):
            parts.append(np.array([[row[layer] for layer in layers] for row in part], dtype=np.float32))
    found = [part for part in parts if len(part)]
    return np.concatenate(found) if found else np.empty(0, np.float32)


def _stored_block(shard: Shard, entry: IndexEntry) -> _Block:
    """A prompt's part of a shard that exists."""
    start, stop = entry.rows
    traits = [trait for trait in shard.index.traits if trait in entry.written]
    columns = np.array(_places(traits, shard.index.traits))

    def values(name: str) -> Numbers:
        return shard.file.array(name)[start:stop][:, columns]

    record = shard.file.array("records")[slice(*entry.record)].tobytes()
    axes = _Axes(traits, shard.index.layers, shard.index.points)
    return _Block(entry.id, axes, stop - start, record, entry.written, values)


def _empty(name: str, n_rows: int, axes: _Axes) -> Numbers:
    rest = (len(axes.layers), len(axes.points)) if name == "scores" else ()
    return np.full((n_rows, len(axes.traits), *rest), np.nan, np.float32)


def _places(names: Sequence[Any], axis: Sequence[Any]) -> list[int]:
    return [axis.index(name) for name in names]


def _write(path: Path, blocks: Sequence[_Block]) -> Written:
    axes, prompts, row, at = _Axes.of(blocks), list[dict[str, Any]](), 0, 0
    for block in blocks:
        rows, record = [row, row + block.n_rows], [at, at + len(block.record)]
        prompts.append({"id": block.prompt_id, "rows": rows, "record": record, "written": block.written})
        row, at = rows[1], record[1]
    shape = (row, len(axes.traits))
    specs = {
        "scores": TensorSpec("F32", (*shape, len(axes.layers), len(axes.points))),
        **{name: TensorSpec("F32", shape) for name in STEPS},
        "records": TensorSpec("U8", (at,)),
    }

    def values(name: str) -> Iterator[Numbers]:
        return (block.values_along(axes, name) for block in blocks)

    pieces: dict[str, Iterable[NDArray[Any]]] = {name: values(name) for name in ("scores", *STEPS)}
    pieces["records"] = (np.frombuffer(block.record, np.uint8) for block in blocks)
    index = {"traits": axes.traits, "layers": axes.layers, "points": axes.points, "prompts": prompts}
    return write_safetensors(path, specs, compact_metadata(KIND, index, NUMBERS), pieces)
