"""Captures at work: what the record of a run says while it goes on, and how much of a set is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tlcapture.runs.recorded_runs import CaptureAtWork, capture_at_work
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.locks import locked


def written(layout: Layout, name: str, status: str, n_done: int, **more: Any) -> None:
    """A record as a run leaves it, of a set of 5 prompts of which 2 were there."""
    folders = {"inference/raw/residual/odd": {"files": n_done, "bytes": 1}} if n_done else {}
    content = {"status": status, "command_line": "tlcapture capture --experiment exp --prompt-set odd",
               "planned": {"odd": {"new": 3, "kept": 2}, "other": {"new": 9, "kept": 0}},
               "files": {"folders": folders}, "failures": [], **more}  # fmt: skip
    path = layout.run_record(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path, "exp")


def counts(found: CaptureAtWork | None) -> tuple[bool, int, int, int] | None:
    return None if found is None else (found.is_running, found.n_done, found.n_planned, found.n_failed)


def test_a_run_that_holds_its_lock_is_at_work_and_counts_what_was_there(layout: Layout) -> None:
    written(layout, "20260102T000000Z-capture-1", "done", 3)
    written(layout, "20260103T000000Z-capture-2", "running", 1, failures=[{"what": "odd/4", "reason": "x"}])
    with locked(layout.lock("captures-of-odd")):
        assert counts(capture_at_work(layout, "odd")) == (True, 3, 5, 1)
    assert counts(capture_at_work(layout, "odd")) == (False, 3, 5, 1), "killed: its lock is free"
    assert capture_at_work(layout, "none") is None


def test_a_later_run_that_was_done_leaves_nothing_to_say(layout: Layout) -> None:
    written(layout, "20260103T000000Z-capture-2", "running", 1)
    written(layout, "20260104T000000Z-capture-3", "done", 3)
    assert capture_at_work(layout, "odd") is None


def test_shards_are_counted_together(layout: Layout) -> None:
    for number, n_done in ((1, 1), (2, 3)):
        written(layout, f"20260103T000000Z-capture-{number}-{number}of2", "running", n_done)
    written(layout, "20260102T000000Z-capture-1", "running", 1)
    with locked(layout.share_lock("captures-of-odd", "shard-of-2-1")):
        assert counts(capture_at_work(layout, "odd")) == (True, 8, 10, 0)


@pytest.mark.parametrize("content", ["", "[]", '{"planned": 3}', '{"planned": {"odd": {"new": "x"}}}'])
def test_a_record_that_cannot_be_read_is_passed_over(layout: Layout, content: str) -> None:
    written(layout, "20260103T000000Z-capture-2", "running", 1)
    layout.run_record("20260104T000000Z-capture-3").write_text(content)
    assert counts(capture_at_work(layout, "odd")) == (False, 3, 5, 0)


def test_projections_are_counted_where_no_raw_files_are_kept(layout: Layout) -> None:
    folders = {f"inference/style/{name}/residual_stream/odd": {"files": 2, "bytes": 1} for name in ("a", "b")}
    written(layout, "20260103T000000Z-capture-2", "running", 0, files={"folders": folders})
    assert counts(capture_at_work(layout, "odd")) == (False, 4, 5, 0)
