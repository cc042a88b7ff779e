"""What `evaluate` found of single traits, in files of their own until it is put into the evaluation file.

extraction/.evaluated/{time}-{process}.json     {"trait", "components": {component: {"rows", "summary"}}, "carry_over"}

The evaluation file holds all traits and is written whole: after each of them, this would take time that grows with the
square of their number. It is written once entries are as large as it is, and at the end; what a run that was killed
left is put into it by the next one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time_ns
from typing import Any

from pydantic import Field

from tlcapture.names import Trait, is_safe_name
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, remove, write_json
from tlcapture.storage.folders import stems_in
from tlcapture.storage.validation import FileContent, checked
from tlcapture.traits.evaluation_files import Evaluation, EvaluationRow, best_by_trait
from tlcapture.traits.selection import is_present
from tlcapture.traits.vector_files import IMPORTED, VectorFiles

_LOCKED = "the evaluation"


class _Component(FileContent):
    """The rows of a component's vectors, and the summary of them together."""

    rows: list[EvaluationRow]
    summary: dict[str, Any] = Field(default_factory=dict)


class Entry(FileContent):
    """What was found of a trait: its vectors by component, or their scores on other datasets by their names."""

    trait: str
    components: dict[str, _Component] = Field(default_factory=dict)
    carry_over: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)

    def is_current(self, layout: Layout) -> bool:
        """Whether all vectors that were evaluated are still there."""
        rows = [row for each in self.components.values() for row in each.rows]
        return len(present_rows(layout, Trait.parse(self.trait), rows)) == len(rows)


def add_entry(run: Run, content: dict[str, Any]) -> None:
    """Keep the content of an `Entry`, and put all that there are into the evaluation once they are as large as it is.

    Example:
        add_entry(run, {"trait": "style/formality", "carry_over": {"essays": rows}})
    """
    with run_lock(run, _LOCKED):
        write_json(_folder(run.layout) / f"{time_ns()}-{os.getpid()}.json", content)
        paths, evaluation = _paths(run.layout), run.layout.evaluation
        size = sum(path.stat().st_size for path in paths)
        if not evaluation.is_file() or size >= evaluation.stat().st_size:
            _put_in(run, paths)


@contextmanager
def entries_put_in(run: Run) -> Iterator[None]:
    """Put the entries of earlier runs into the evaluation first, and those of this one at the end, or when it stops.

    Entries of vectors that were removed or extracted again since are left out.
    """
    if _paths(run.layout):
        with run_lock(run, _LOCKED):
            _put_in(run, _paths(run.layout), only_current=True)
    try:
        yield
    finally:
        if _paths(run.layout):
            with run_lock(run, _LOCKED):
                _put_in(run, _paths(run.layout))


def present_rows(layout: Layout, trait: Trait, rows: Iterable[EvaluationRow]) -> list[EvaluationRow]:
    """The rows of a trait whose vectors have neither been removed nor extracted again."""
    return [row for row in rows if row.trait == str(trait) and is_present(VectorFiles(layout, trait), row)]


def with_entries(layout: Layout, entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of the evaluation file, with new rows in place of those of the same vectors.

    Rows of these traits whose vectors were removed or extracted again are left out.
    """
    before = Evaluation.read(layout.evaluation)
    evaluated = {each.trait for each in entries if each.components}
    kept = {
        row.key: row
        for row in before.all_results
        if row.trait not in evaluated or present_rows(layout, Trait.parse(row.trait), [row])
    }
    summaries: dict[tuple[str, str], dict[str, Any]] = {}
    carried = before.carry_overs
    for entry in entries:
        for component, found in entry.components.items():
            kept |= {row.key: row for row in found.rows}
            summaries[entry.trait, component] = found.summary
        for dataset, scored in entry.carry_over.items():
            carried.setdefault(dataset, {})[entry.trait] = scored
    rows = [kept[key] for key in sorted(kept)]
    known = {trait: each.summary for trait, each in before.by_trait.items()}
    best = {
        trait: row.as_written()
        | ({} if row.method == IMPORTED else summaries.get((trait, row.component), known.get(trait, {})))
        for trait, row in best_by_trait(rows).items()
    }
    content = before.model_dump(exclude_unset=True)
    if evaluated:
        cross = before.cross_trait if isinstance(before.cross_trait, dict) else {}
        content |= {"all_results": [row.as_written() for row in rows], "best_vectors": best, "cross_trait": cross}
    return content | ({"carry_over": carried} if any(each.carry_over for each in entries) else {})


def _put_in(run: Run, paths: Sequence[Path], *, only_current: bool = False) -> None:
    layout = run.layout
    entries = [checked(Entry, read_json(path), path, "part of an evaluation") for path in paths]
    if only_current:
        entries = [each for each in entries if each.is_current(layout)]
    if entries:
        run.wrote(write_json(layout.evaluation, with_entries(layout, entries), indent=True))
    remove(paths)
    with suppress(OSError):
        _folder(layout).rmdir()


def _folder(layout: Layout) -> Path:
    return layout.own(layout.evaluation.parent / ".evaluated")


def _paths(layout: Layout) -> list[Path]:
    """The files of all entries, the earliest first."""
    folder = _folder(layout)
    return [folder / f"{name}.json" for name in sorted(stems_in(folder, ".json")) if is_safe_name(name)]
