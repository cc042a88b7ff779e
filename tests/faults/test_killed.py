"""A killed run loses only its current prompt; the next run completes the files of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.evidence import Evidence
from tests.faults.commands import Command, Ended, contents
from tests.faults.conftest import Start


def die_at(change_number: int) -> None:
    """Kill this process when it is about to rename a file to its path in an experiment, or to remove one."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove") and "/experiments/" in str(arguments[0]):
            seen += os.path.exists(arguments[0])
            if seen == change_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_before(name: str) -> None:
    """Kill this process when it is about to give the first file this name."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.path.basename(arguments[1]) == name:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_when_removing(name: str) -> None:
    """Kill this process when it is about to remove a file of this name."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.remove" and os.path.basename(arguments[0]) == name:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    "die",
    [
        partial(die_when_removing, "mean_diff_layer1.pt"),
        partial(die_when_removing, "metadata.json"),
        partial(die_before, "training_mean.pt"),
        partial(die_before, "metadata.json"),
    ],
)
def test_a_killed_extraction_leaves_no_vectors_of_the_examples_before(
    fresh: Path, tiny_folder: Path, tmp_path: Path, die: Callable[[], object]
) -> None:
    def extract(before: Callable[[], object] = lambda: None) -> Ended:
        common = ("--root", fresh, "--experiment", "exp", "--model", tiny_folder, "--traits", "tone/loud")
        fewer = ("--component", "residual", "--methods", "mean_diff,probe", "--seed", 1, "--layers", 1)
        return Command(tmp_path / "output", "extract", *common, *fewer, "--skip-existing", before=before).end()

    assert extract(die).code == -signal.SIGKILL
    assert extract().code == 0
    names = os.listdir(fresh / "experiments" / "exp" / "extraction" / "tone" / "loud" / "vectors")
    kept = [name for name in sorted(names) if not name.startswith("attn_out_")]
    assert kept == ["mean_diff_layer1.pt", "metadata.json", "probe_layer1.pt", "training_mean.pt"]


def test_a_run_killed_before_any_change_of_the_experiment_can_be_resumed(
    start: Start,
    template: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evidence: Evidence,
) -> None:
    killed = 0
    for number in range(1, 1000):
        monkeypatch.setenv("TLCAPTURE_WRITERS", str(number % 3))  # the files are written here, or by one or two threads
        root = tmp_path / f"root{number}"
        shutil.copytree(template, root)
        ended = start(root=root, before=lambda number=number: die_at(number)).end()
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.stderr
        killed += 1
        resumed = start("--skip-existing", root=root).end()
        assert resumed.code == 0, resumed.stderr
        assert contents(root / "experiments" / "exp") == uninterrupted, f"killed at change {number}"
        shutil.rmtree(root)
    assert killed > 15
    evidence.survived(
        "kill -9 when a file is about to be renamed to its path or removed, then --skip-existing",
        f"at each of the {killed} such moments of a capture with all add-ons, one run for each",
        "the files of an uninterrupted run, equal to the last bit except for dates",
    )


def test_a_killed_run_that_keeps_only_projections_can_be_resumed(
    template: Path, tiny_folder: Path, tmp_path: Path, evidence: Evidence
) -> None:
    def run(root: Path, *words: object, before: Callable[[], object] = lambda: None) -> Ended:
        common = ("--root", root, "--experiment", "exp", "--model", tiny_folder, "--prompt-set", "short")
        only = ("--projections-only", "--max-new-tokens", 4, "--logit-lens")
        return Command(root.parent / "output", "capture", *common, *only, *words, before=before).end()

    root = Path(shutil.copytree(template, tmp_path / "whole"))
    assert run(root).code == 0
    uninterrupted, killed = contents(root / "experiments" / "exp"), 0
    for number in range(1, 1000):
        root = Path(shutil.copytree(template, tmp_path / f"root{number}"))
        if run(root, before=lambda number=number: die_at(number)).code == 0:
            break
        killed += 1
        assert run(root, "--skip-existing").code == 0
        found = contents(root / "experiments" / "exp")
        assert undated(found) == undated(uninterrupted), f"killed at change {number}"
    assert killed > 8
    evidence.survived(
        "kill -9 when a file is about to be renamed to its path or removed, with --projections-only, then "
        "--skip-existing",
        f"at each of the {killed} such moments, one run for each",
        "the files of an uninterrupted run, equal to the last bit except for dates",
    )


def undated(found: dict[str, Any]) -> dict[str, Any]:
    """Files without the capture date in the metadata of projections."""
    for name, content in found.items():
        if "_stream/" in name:
            content["metadata"]["capture"].pop("capture_date", None)
    return found


def test_a_run_killed_repeatedly_at_random_times_can_be_resumed(
    start: Start, template: Path, uninterrupted: dict[str, Any], tmp_path: Path, evidence: Evidence
) -> None:
    chance, kills, finished, longest = random.Random(0), 0, 0, 1.0
    root = Path(shutil.copytree(template, tmp_path / "captured0"))
    while kills < 8 or not finished:
        began = time.monotonic()
        command = start("--skip-existing", root=root)
        if kills < 8:
            time.sleep(chance.uniform(0, longest))
            command.send(signal.SIGKILL)
        ended = command.end()
        if ended.code == -signal.SIGKILL:
            kills += 1
            for name, value in _whole(root).items():
                assert value == uninterrupted[name], name
            continue
        assert ended.code == 0, ended.stderr
        assert contents(root / "experiments" / "exp") == uninterrupted
        finished, longest = finished + 1, min(longest, time.monotonic() - began)
        root = Path(shutil.copytree(template, tmp_path / f"captured{finished}"))
    evidence.survived(
        "kill -9 repeatedly, each time resumed with --skip-existing",
        f"{kills} kills of {finished} captures, at random moments from start-up to end",
        "every existing file is complete after each kill; at the end the files of an uninterrupted run",
    )


def _whole(root: Path) -> dict[str, Any]:
    """The existing files, without temporary files, markers and the config, which may be recorded later."""
    copied = root.parent / "looked-at"
    shutil.copytree(root / "experiments" / "exp", copied, ignore=shutil.ignore_patterns(".*", "config.json"))
    found = contents(copied)
    shutil.rmtree(copied)
    return found


def test_a_killed_run_leaves_a_record_with_status_running(start: Start, fresh: Path) -> None:
    records = fresh / "experiments" / "exp" / "runs"
    killed = start("--batch-size", 1, "--max-new-tokens", 150)  # whose second prompt takes a while
    killed.wait_for(lambda: list(records.glob("*-capture-*.json")))
    killed.send(signal.SIGKILL)
    assert killed.end().code == -signal.SIGKILL
    (record,) = (json.loads(path.read_bytes()) for path in records.glob("*-capture-*.json"))
    assert record["status"] == "running"
    assert record["arguments"]["prompt_set"] == ["short"]
    assert start("--skip-existing").end().code == 0
