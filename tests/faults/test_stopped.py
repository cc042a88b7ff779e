"""Ctrl-C and SIGTERM: the current prompt is finished, and the run reports what was done and how to resume."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.evidence import Evidence
from tests.faults.commands import contents
from tests.faults.conftest import Start

SLOW = ("--batch-size", 1)


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_stops_the_run_between_files(
    start: Start, fresh: Path, tmp_path: Path, evidence: Evidence, number: signal.Signals, code: int, name: str
) -> None:
    whole = start(*SLOW)
    assert whole.end().code == 0
    expected = contents(fresh / "experiments" / "exp")
    for path in (fresh / "experiments" / "exp").glob("[ai]n*"):
        path.rename(tmp_path / path.name)
    raw = fresh / "experiments" / "exp" / "inference" / "raw" / "residual" / "short"
    stopped = start(*SLOW)
    stopped.wait_for(lambda: list(raw.glob("*.pt")))
    stopped.send(number)
    ended = stopped.end()
    assert ended.code == code, ended
    assert "stopping after the current file is written" in ended.stderr
    assert f"stopped by {name}; to resume: tlcapture capture --root" in ended.stderr
    assert ended.stderr.strip().endswith("--skip-existing")
    assert "wrote 6 files" in ended.stdout  # those of the current prompt
    assert "Traceback" not in ended.stderr
    for file, value in contents(fresh / "experiments" / "exp").items():
        assert value == expected[file]
    records = [json.loads(path.read_bytes()) for path in raw.parents[3].glob("runs/*-capture-*.json")]
    assert {record["status"] for record in records} == {"done", "interrupted"}
    assert start(*SLOW, "--skip-existing").end().code == 0
    assert contents(fresh / "experiments" / "exp") == expected
    evidence.survived(
        f"{name} in the middle of a capture",
        "sent when the first file appears",
        f"the current prompt is completed, exit status {code}, the command to resume is shown; a resumed run "
        "completes the files of an uninterrupted run",
    )


def test_a_second_signal_stops_immediately(start: Start, fresh: Path, tmp_path: Path) -> None:
    raw = fresh / "experiments" / "exp" / "inference" / "raw" / "residual" / "short"

    def never_stop_at_checks() -> None:
        from tlcapture.cli.stopping import StopSignals

        def wait(self: StopSignals) -> None:
            if self._asked is not None:  # where it would stop, it waits for the second signal
                (tmp_path / "waits").touch()
                time.sleep(60)

        StopSignals.check = wait  # type: ignore[method-assign]

    stopped = start("--max-new-tokens", 150, before=never_stop_at_checks)
    stopped.wait_for((raw / "2.pt").exists)
    stopped.send(signal.SIGINT)
    stopped.wait_for((tmp_path / "waits").exists)
    assert "repeat to stop immediately" in stopped.stderr
    stopped.send(signal.SIGINT)
    ended = stopped.end()
    assert ended.code == 130, ended
    assert "Traceback" not in ended.stderr
    assert not list(raw.glob("*.tmp"))


@pytest.mark.parametrize("words", [("evaluate",), ("steer", "--layers", "1", "--coefficients", "0.1,0.2,0.3")])
def test_other_commands_stop_too_and_keep_finished_results(fresh: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    from tests.faults.commands import Command

    for trait in ("loud", "warm"):
        questions = [{"id": str(n), "question": f"q{n}?", "positive": "YES", "negative": "no"} for n in range(3)]
        path = fresh / "datasets" / "traits" / "tone" / trait / "steering.json"
        path.write_text(json.dumps({"questions": questions}))
    exp = fresh / "experiments" / "exp"
    result = exp / "extraction" / "extraction_evaluation.json" if words[0] == "evaluate" else exp / "steering"
    command = Command(tmp_path / "output", words[0], "--root", fresh, "--experiment", "exp", *words[1:])
    command.wait_for(lambda: list(result.rglob("*.json")) or result.is_file())
    command.send(signal.SIGINT)
    ended = command.end()
    assert ended.code == 130, ended
    assert "to resume: tlcapture" in ended.stderr
    assert contents(exp)
    again = Command(tmp_path / "output", words[0], "--root", fresh, "--experiment", "exp", *words[1:]).end()
    assert again.code == 0, again.stderr


def test_a_record_describes_the_run(start: Start, fresh: Path) -> None:
    ended = start("--seed", 7).end()
    assert ended.code == 0
    (path,) = (fresh / "experiments" / "exp" / "runs").glob("*-capture-*.json")
    record: dict[str, Any] = json.loads(path.read_bytes())
    assert (record["status"], record["exit_code"], record["error"]) == ("done", 0, None)
    assert record["arguments"]["seed"] == 7
    assert record["command_line"].startswith("tlcapture capture --root")
    assert {"tlcapture", "python", "torch", "transformer_lens", "transformers", "numpy"} <= set(record["versions"])
    assert record["model"]["engine"] == tiny.ENGINES[0]
    assert record["started"] <= record["ended"]
    assert record["files"]["count"] == len(record["files"]["list"]) == 12
    exp = path.parents[1]
    assert all((exp / name).stat().st_size == size for name, size in record["files"]["list"])
    assert record["files"]["bytes"] == sum(size for _, size in record["files"]["list"])
