"""What commands print, to which stream, and the record they leave."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tlcapture.captures.capture import Capture
from tlcapture.cli.main import main

Run = Callable[..., Result]


def test_json_is_alone_on_standard_output(capture: Run, raw: Path) -> None:
    result = capture("--json", "--attention")
    summary = json.loads(result.stdout)
    assert (summary["status"], summary["exit_code"], summary["error"]) == ("done", 0, None)
    n_new = sum(len(Capture.open(path).response.token_ids) for path in raw.glob("*.pt"))
    assert (summary["prompts"], summary["new_tokens"], summary["failures"]) == (3, n_new, [])
    assert summary["files"]["count"] == 6
    assert summary["files"]["folders"]["inference/raw/residual/short"]["files"] == 3
    assert summary["model"]["n_layers" if "n_layers" in summary["model"] else "engine"]
    assert "loading" in result.stderr
    record = json.loads(Path(summary["record"]).read_bytes())
    assert record["files"] == summary["files"]
    again = json.loads(capture("--json", "--skip-existing", "--attention").stdout)
    assert (again["skipped"], again["files"]["count"]) == (3, 0)


def test_json_holds_failures_and_errors(capture: Run, data: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    make_prompt_set(data, "short", ["fine", "x" * 400])
    result = capture("--json")
    summary = json.loads(result.stdout)
    assert (summary["status"], summary["exit_code"], result.exit_code) == ("failed", 1, 1)
    assert summary["failures"][0]["what"] == "short/2"
    assert summary["failures"][0]["reason"].startswith("does not fit: ")
    wrong = capture("--json", prompts=("--prompt-set", "nix"))
    summary = json.loads(wrong.stdout)
    assert (summary["status"], summary["exit_code"], wrong.exit_code) == ("failed", 2, 2)
    assert summary["error"].startswith("no prompt set 'nix'")
    assert wrong.stderr.startswith("error: no prompt set 'nix'")


def test_quiet_prints_only_warnings_and_failures(capture: Run, extract: Run, data: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    assert extract("-q").output == ""
    make_prompt_set(data, "short", ["fine", "x" * 400])
    result = capture("--quiet")
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: ")
    assert lines[1].startswith("failed: short/2: ")
    assert capture("-q", "-v").exit_code == 2


def test_verbose_reports_every_file_and_batch(capture: Run) -> None:
    stderr = capture("-v").stderr
    assert len(re.findall(r"^DEBUG tlcapture\.storage\.files: wrote .*short/\d\.pt, ", stderr, re.MULTILINE)) == 3
    assert "a batch of 3 prompts" in stderr
    assert "DEBUG" not in capture().stderr


def test_a_log_file_gets_every_message_with_a_timestamp_and_is_appended_to(capture: Run, data: Path) -> None:
    log = data / "logs" / "run.log"
    assert capture("--log-file", log, "-q").exit_code == 0
    lines = log.read_text().splitlines()
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (DEBUG|INFO|WARNING|ERROR) tlcapture\.[\w.]+: .+")
    assert all(form.fullmatch(line) for line in lines)
    assert any("short/1: 6 tokens" in line for line in lines)
    assert capture("--log-file", log, prompts=("--prompt-set", "nix")).exit_code == 2
    more = log.read_text().splitlines()
    assert more[: len(lines)] == lines
    assert "ERROR tlcapture.cli.shown: error: no prompt set 'nix'" in more[-1]


def test_a_log_file_that_cannot_be_written_is_wrong_usage(capture: Run, data: Path) -> None:
    (data / "file").touch()
    result = capture("--log-file", data / "file" / "log")
    assert result.exit_code == 2
    assert "--log-file" in result.stderr
    assert not (data / "experiments").exists()


@pytest.mark.parametrize("command", ["capture", "project", "extract", "evaluate", "steer"])
def test_every_command_that_does_work_has_the_output_options(tlcapture: Run, command: str) -> None:
    text = tlcapture(command, "--help").output
    assert all(option in text for option in ("--verbose", "--quiet", "--log-file", "--json"))


def test_every_command_leaves_a_record(capture: Run, extract: Run, tlcapture: Run, data: Path) -> None:
    extract()
    capture()
    tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    tlcapture("evaluate", "--experiment", "exp", "--component", "residual", "--methods", "probe")
    records = [json.loads(path.read_bytes()) for path in (data / "experiments" / "exp" / "runs").glob("*.json")]
    assert sorted(record["command"] for record in records) == ["capture", "evaluate", "extract", "project"]
    assert all(record["status"] == "done" and record["files"]["count"] for record in records)
    refused = tlcapture("project", "--experiment", "exp", "--prompt-set", "nix")
    assert refused.exit_code == 2
    assert len(list((data / "experiments" / "exp" / "runs").glob("*.json"))) == 4


def test_fsync_has_every_file_and_folder_on_the_disk(capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    assert capture("--limit", 1).exit_code == 0
    assert not synced
    assert capture("--limit", 1, "--fsync").exit_code == 0
    raw = data / "experiments" / "exp" / "inference" / "raw" / "residual" / "short"
    assert str(raw) in synced, "the folder, which holds the name"
    assert any(path.startswith(f"{raw}/.1.pt.") for path in synced), "the file, before it has its name"
    assert "TLCAPTURE_FSYNC" not in os.environ


def test_fsync_is_refused_where_it_would_not_reach_the_workers(capture: Run) -> None:
    refused = capture("--fsync", "--executor", "ray", "--ray-address", "127.0.0.1:1")
    assert refused.exit_code == 2
    assert "set TLCAPTURE_FSYNC=1 for 'ray start' on every node" in refused.stderr


@pytest.mark.parametrize("words", [["frob"], ["capture", "--seed", "x"], ["list", "--experiment", "none"]])
def test_no_color_leaves_errors_without_colours(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31merror: " in CliRunner().invoke(main, words, color=True).stderr
    monkeypatch.setenv("NO_COLOR", "1")
    result = CliRunner().invoke(main, words, color=True)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "\x1b" not in result.output
