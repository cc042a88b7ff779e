"""The facts that decide whether a prompt is projected onto a vector. An index of files keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from tlcapture.captures.known_capture import KnownCapture, digest
from tlcapture.captures.provenance import SAME_COMPUTATION
from tlcapture.commands.prompt_files.records import SAME_FOR_A_RUN, CaptureRecord
from tlcapture.errors import InputError, StorageError
from tlcapture.storage.compact.projection_shards import Shard
from tlcapture.storage.experiments.file_index import Facts, as_facts
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.files import ProjectionFile

_SOURCE = ("experiment", "method", "layer")
Content = Mapping[str, Any]  # of a projection file


@dataclass(frozen=True)
class KnownProjection:
    """The facts about a prompt's projection onto a trait.

    Attributes:
        source: experiment, method and layer of the vector, as far as they are recorded; and `centred`, where the mean
            activation was subtracted.
        written_ns: when it was written, in nanoseconds since the epoch.
        capture: the capture that it was made from, where its activations were not saved.
    """

    source: Mapping[str, Any]
    written_ns: int
    capture: KnownCapture | None = None


def facts_of_projection(content: Content) -> Facts | None:
    """The facts about a projection file, from its content, whose texts may be JSON already."""
    made_from = _made_from(content)
    of_capture = () if made_from is None else made_from.facts()
    try:
        source = _facts_of_source(**_source(content))
    except TypeError:  # it has other than texts and numbers, and no index holds those
        return None
    return None if source is None or of_capture is None else (*source, *of_capture)


def facts_in_json(path: Path) -> Facts | None:
    """The facts about a projection file in JSON; raises `StorageError` if it is damaged."""
    content = read_json(path)
    ProjectionFile.parse(content, path)
    return facts_of_projection(content)


@lru_cache(maxsize=1024)
def _facts_of_source(**source: Any) -> Facts | None:
    return as_facts(source)


def known_projection(written_ns: int, source: Mapping[str, Any], *of_capture: Any) -> KnownProjection:
    """The inverse of `facts_of_projection`; raises `TypeError` or `ValueError` for other facts."""
    return KnownProjection(dict(source), written_ns, KnownCapture.from_facts(*of_capture) if of_capture else None)


def facts_of_shard(shard: Shard) -> Facts | None:
    """The facts about a shard; raises `StorageError` if it is damaged."""
    found: list[bytes] = []
    for entry in shard.index.prompts:
        facts = facts_in_shard(entry.id, shard.labels(entry), entry.written)
        if facts is None:
            return None
        found += facts
    return tuple(found)


def facts_in_shard(name: str, contents: Mapping[str, Content], written: Mapping[str, int]) -> Facts | None:
    """The four parts of a prompt's facts, from its projections by trait, and when each was written."""
    captures = [_made_from(content) for content in contents.values()]
    is_of_one_run = None not in captures and len({each.run for each in captures if each is not None}) == 1
    of_capture = captures[0].facts() if captures[0] is not None and is_of_one_run else as_facts(None, None)
    times = set(written.values())
    when = next(iter(times)) if len(times) == 1 else dict(written)
    own = as_facts([name, when], {trait: _source(content) for trait, content in contents.items()})
    return None if own is None or of_capture is None else (*own, *of_capture)


def known_shard(*facts: Any) -> dict[str, dict[str, KnownProjection]]:
    """The inverse of `facts_of_shard`, by prompt and trait; raises `TypeError` or `ValueError` for other facts."""
    return dict(_known_of_prompts(facts))


def _known_of_prompts(facts: Sequence[Any]) -> Iterator[tuple[str, dict[str, KnownProjection]]]:
    for start in range(0, len(facts), 4):
        (name, when), sources, shared, own = facts[start : start + 4]
        capture = None if shared is None else KnownCapture.from_facts(shared, own)
        times = when if isinstance(when, dict) else dict.fromkeys(sources, when)
        yield name, {trait: KnownProjection(source, times[trait], capture) for trait, source in sources.items()}


def _source(content: Content) -> dict[str, Any]:
    try:
        metadata = content["metadata"]
        source = metadata["vector_source"]
        centred = {"centred": True} if metadata.get("centered") is not None else {}
        return {name: source[name] for name in _SOURCE if name in source} | centred
    except (KeyError, TypeError):
        return {}


def _made_from(content: Content) -> KnownCapture | None:
    """The capture that a projection was made from, if its metadata is recorded."""
    try:
        if "capture" not in content["metadata"]:
            return None
        prompt, response = orjson.loads(orjson.dumps([content["prompt"], content["response"]]))
        record = CaptureRecord.of_projection({**content, "prompt": prompt, "response": response})
        if record is None or record.positions is None:
            return None
        same = [record.metadata.get(key) for key in (*SAME_COMPUTATION, *SAME_FOR_A_RUN)]
        run = digest([record.tokens, record.positions.kept, same])
        return KnownCapture.of_record(record.metadata, record.tokens, record.positions, record.kept, run=run)
    except (StorageError, InputError, KeyError, TypeError, ValueError):
        return None
