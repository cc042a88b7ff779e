"""A run that is killed loses the prompt in hand and nothing else; the next one ends where it would have ended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.evidence import Evidence
from tests.faults.commands import Command, contents
from tests.faults.conftest import Start, capture_words


def die_at(change_number: int) -> None:
    """Kill this process when it is about to put a file into its place in an experiment, or to remove one."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove") and "/experiments/" in str(arguments[0]):
            seen += os.path.exists(arguments[0])
            if seen == change_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_before_every_single_change_of_the_experiment(
    start: Start, template: Path, undisturbed: dict[str, Any], tmp_path: Path, evidence: Evidence
) -> None:
    killed = 0
    for number in range(1, 1000):
        root = tmp_path / f"root{number}"
        shutil.copytree(template, root)
        ended = start(root=root, before=lambda number=number: die_at(number)).end()
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.stderr
        killed += 1
        resumed = start("--skip-existing", root=root).end()
        assert resumed.code == 0, resumed.stderr
        assert contents(root / "experiments" / "exp") == undisturbed, f"killed at change {number}"
        shutil.rmtree(root)
    assert killed > 15
    evidence.survived(
        "kill -9 when a file is about to be put in place or removed, then --skip-existing",
        f"at each of the {killed} such moments of a capture with all add-ons, one run for each",
        "the files of an undisturbed run, equal to the last bit but for dates",
    )


def test_killed_again_and_again_at_random_moments(
    start: Start, template: Path, undisturbed: dict[str, Any], tmp_path: Path, evidence: Evidence
) -> None:
    chance, kills, finished, longest = random.Random(0), 0, 0, 1.0
    root = Path(shutil.copytree(template, tmp_path / "captured0"))
    while kills < 8 or not finished:
        began = time.monotonic()
        command = start("--skip-existing", root=root)
        if kills < 8:
            time.sleep(chance.uniform(0, longest))
            command.tell(signal.SIGKILL)
        ended = command.end()
        if ended.code == -signal.SIGKILL:
            kills += 1
            for name, value in _whole(root).items():
                assert value == undisturbed[name], name
            continue
        assert ended.code == 0, ended.stderr
        assert contents(root / "experiments" / "exp") == undisturbed
        finished, longest = finished + 1, min(longest, time.monotonic() - began)
        root = Path(shutil.copytree(template, tmp_path / f"captured{finished}"))
    evidence.survived(
        "kill -9 again and again, --skip-existing between",
        f"{kills} kills of {finished} captures, at random moments from start-up to end",
        "every file there was whole after each kill; at the end as undisturbed",
    )


def _whole(root: Path) -> dict[str, Any]:
    """The captures that are there; a temporary or a mark is none, and the config may be from before."""
    copied = root.parent / "looked-at"
    shutil.copytree(root / "experiments" / "exp", copied, ignore=shutil.ignore_patterns(".*", "config.json"))
    found = contents(copied)
    shutil.rmtree(copied)
    return found


def test_a_program_that_is_killed_leaves_a_record_that_says_it_ran(fresh: Path, tiny_folder: Path) -> None:
    words = [str(word) for word in capture_words(fresh, tiny_folder)]
    program = subprocess.Popen([sys.executable, "-m", "tlcapture", *words], stderr=subprocess.PIPE)
    records = fresh / "experiments" / "exp" / "runs"
    while not list(records.glob("*-capture-*.json")):
        assert program.poll() is None
        time.sleep(0.001)
    program.kill()
    program.communicate()
    (record,) = (json.loads(path.read_bytes()) for path in records.glob("*-capture-*.json"))
    assert record["status"] == "running"
    assert record["arguments"]["prompt_set"] == ["short"]
    assert Command(fresh.parent / "said", *words, "--skip-existing").end().code == 0
