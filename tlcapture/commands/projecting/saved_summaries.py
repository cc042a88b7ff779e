"""The summary of a prompt set from the last run, so that a run that finds everything finished need not read files.

`.locks/summary-of-{set}-{component}.json` holds it with a digest of its projections: paths, sizes and
times. It is only a cache, like the index of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from os import lstat
from pathlib import Path
from typing import Any

from tlcapture.captures.known_capture import digest
from tlcapture.commands.projecting import top_traits
from tlcapture.commands.projecting.top_traits import Findings, OverSamples, Summary, TopTrait
from tlcapture.commands.prompt_files.known_files import KnownFiles
from tlcapture.errors import StorageError
from tlcapture.names import COMPACT
from tlcapture.storage.compact.projection_shards import MERGED
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState, read_json, write_json
from tlcapture.storage.folders import names_in
from tlcapture.traits.statistics.rises import DEFINITIONS
from tlcapture.traits.verdicts import UsedVector
from tlcapture.version import __version__

_RULES = 2  # the version of what stands out


def summary_of_run(
    layout: Layout, prompt_set: str, component: str, known: Mapping[str, bytes], seen: Mapping[Path, FileState]
) -> Summary:
    """The result of `summary_of`, taken from the last run if no projection has changed since.

    `seen` are the states of files that this run has looked at; the others are looked at now.
    """
    path = layout.lock(f"summary-of-{prompt_set}-{component}").with_suffix(".json")
    of = _digest(layout, prompt_set, component, seen)
    with suppress(StorageError, KeyError, TypeError, ValueError):
        content = read_json(path) if path.is_file() else {}
        if content["of"] == of:
            return _from_json(content["summary"])
    problems: list[StorageError] = []
    found = top_traits.summary_of(layout, prompt_set, component, known, problems.append)
    if not problems and path.parent.is_dir():
        with suppress(StorageError, TypeError):
            write_json(path, {"of": of, "summary": asdict(found)})
    return found


def _digest(layout: Layout, prompt_set: str, component: str, seen: Mapping[Path, FileState]) -> str:
    """A digest of the files of a set's projections, which are not read."""
    files = KnownFiles(layout, prompt_set, 0)
    folders = [(files.projections(*pair), ".json") for pair in files.projected if pair[1] == component]
    shards = files.shards[component]
    folders += [(shards, COMPACT), (shards / MERGED, COMPACT)]
    begin = f"{layout.folder}/"
    below = ((str(folder).removeprefix(begin), folder, ending) for folder, ending in folders)
    names = [f"{place}/{name}" for place, folder, ending in below for name in names_in(folder) if name.endswith(ending)]
    known = {str(path).removeprefix(begin): state for path, state in seen.items()}
    names.sort(key=lambda each: each.split("/"))  # the order of paths, which are compared part by part
    states = [[name, known.get(name) or _state(begin + name)] for name in names]
    return digest([__version__, DEFINITIONS, _RULES, states])


def _state(path: str) -> FileState | None:
    with suppress(OSError):
        return FileState.of(lstat(path))
    return None


def _from_json(value: Mapping[str, Any]) -> Summary:
    """The summary of a file; raises `TypeError`, `KeyError` or `ValueError` for anything else."""
    findings = value["findings"]
    tops = [_top(**each) for each in value["tops"]]
    vectors = [UsedVector(**each) for each in value["vectors"]]
    return Summary(tops, None if findings is None else Findings(**findings), value["is_against_set"], vectors)


def _top(samples: Mapping[str, Any] | None, pieces: Any, **others: Any) -> TopTrait:
    over = None if samples is None else OverSamples(**samples)
    return TopTrait(**others, samples=over, pieces=[(text, score) for text, score in pieces])
