"""The record of a capture while it goes on: what it planned, and how much of that is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tlcapture.errors import StorageError
from tlcapture.runs import record


def test_the_record_says_how_much_was_planned_and_is_made(
    capture: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, Any]] = []
    write = record.write_json

    def watched(path: Path, value: Any, **how: Any) -> Any:
        made = value["files"]["folders"].get("inference/raw/residual/short", {"files": 0})["files"]
        seen.append((value["status"], made, value["planned"]["short"]))
        return write(path, value, **how)

    monkeypatch.setattr(record, "write_json", watched)
    monkeypatch.setattr(record, "_EVERY", 0)
    monkeypatch.setattr(record, "_TIMES", 0)
    assert capture("--limit", "1").exit_code == 0
    seen.clear()
    assert capture("--skip-existing", "--batch-size", "1").exit_code == 0
    assert {str(planned) for _, _, planned in seen} == {str({"new": 2, "kept": 1})}
    assert sorted({made for status, made, _ in seen if status == "running"}) == [1, 2]
    assert seen[-1][:2] == ("done", 2)


def test_a_record_is_not_written_for_every_file(
    capture: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = record.write_json
    monkeypatch.setattr(record, "_EVERY", 1e9)
    monkeypatch.setattr(
        record, "write_json", lambda *args, **how: (written.append(args[1]["status"]), write(*args, **how))[1]
    )
    assert capture("--batch-size", "1").exit_code == 0
    assert written == ["running", "done"]


def test_a_record_that_cannot_be_written_stops_nothing(
    capture: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any, **how: Any) -> Any:
        raise StorageError(f"{path}: cannot be written: full")

    monkeypatch.setattr(record, "write_json", full)
    assert capture().exit_code == 0
