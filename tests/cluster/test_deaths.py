"""What becomes of work whose workers or nodes die: all of it is done but what is at fault, which fails by name."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import number_work
from tests.cluster.conftest import SimulatedCluster
from tests.cluster.number_work import DEADLY, SLOW, WRONG
from tests.faults.commands import Command


def start(address: str, root: Path, **call: Any) -> Command:
    """The work in a process that imports Ray when it connects, as commands do."""

    def work() -> None:
        print(json.dumps(number_work.main(address, root, **call)))
        sys.exit()

    return Command(root / "output", before=work)


def report_of(command: Command) -> dict[str, Any]:
    ended = command.end()
    assert ended.code == 0, ended.stderr
    assert ended.stdout.count("\n") == 1, "Ray's messages about deaths are not printed"
    return dict(json.loads(ended.stdout))


def written(root: Path) -> set[int]:
    return {int(path.name) for path in (root / "experiments" / "exp").iterdir() if path.name.isdecimal()}


def begun(root: Path) -> Counter[int]:
    return Counter(map(int, (root / "begun").read_text().split()))


NUMBERS = [0, DEADLY, 2, 3]
CALLS: dict[str, dict[str, Any]] = {
    "one": {"numbers": NUMBERS, "most": 2, "workers": 2},
    "every": {"numbers": [*range(DEADLY, DEADLY + 50)], "most": 1, "workers": 1, "_MOST_DEATHS": 0},
    "version": {"numbers": [1], "most": 1, "workers": 1, "is_there": False},
    "bug": {"numbers": [WRONG], "most": 1, "workers": 1},
}


@pytest.fixture(scope="module")
def ended(
    cluster: SimulatedCluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], Path]]:
    """The report and the root of each of the `CALLS`, which run at once: most of the time they wait for Ray."""
    roots = {name: tmp_path_factory.mktemp(name) for name in CALLS}
    running = {name: start(cluster.address, roots[name], cpus=0.5, **call) for name, call in CALLS.items()}
    return {name: (report_of(process), roots[name]) for name, process in running.items()}


def test_of_a_piece_that_kills_its_workers_only_the_prompt_at_fault_fails_by_name(ended: Any) -> None:
    found, root = ended["one"]
    assert found["error"] is None
    failures = [(each["what"], each["reason"][:23]) for each in found["failures"]]
    assert failures == [(f"[{DEADLY}]", "its worker died 3 times")]
    assert written(root) == {*NUMBERS} - {DEADLY}
    left = [path.name for path in (root / "experiments").rglob("*") if path.is_file() and not path.name.isdecimal()]
    assert not left, "what a worker was writing when it died"
    assert found["prompts"] == 3
    assert begun(root)[DEADLY] == 2 + 3, "twice in the piece of two, three times alone"
    assert Counter(found["retried"]) == {str([0, DEADLY]): 2, str([DEADLY]): 2}


def test_workers_that_die_of_everything_end_the_run(ended: Any) -> None:
    found, root = ended["every"]
    assert found["error"].startswith("ClusterError: 2 workers died in a row, the last one with: ")
    assert begun(root) == {DEADLY: 3}


def test_an_unexpected_error_ends_the_run_and_is_not_tried_again(ended: Any) -> None:
    found, root = ended["bug"]
    assert "a bug" in found["error"]
    assert begun(root) == {WRONG: 1}


def test_a_node_with_another_version_is_named_in_one_line(ended: Any) -> None:
    found, _ = ended["version"]
    assert found["error"].startswith(f"ClusterError: {socket.gethostname()}: ")
    assert "No module named 'tlcapture.not_there'" in found["error"]
    assert found["error"].endswith(": every node needs the same version of tlcapture and of Python")


def test_work_on_a_node_that_leaves_is_done_by_the_others(cluster: SimulatedCluster, tmp_path: Path) -> None:
    """Its worker waits for a node with room for it, which there is none of: an idle worker takes its piece over."""
    cluster.with_third_node()
    every = [SLOW + number for number in range(15)]
    running = start(cluster.address, tmp_path, numbers=every, most=3, workers=3)
    running.wait_for(lambda: (tmp_path / "begun").exists() and len(begun(tmp_path)) >= 4)
    cluster.lose_third_node(gracefully=True)
    lost = time.monotonic()
    found = report_of(running)
    assert time.monotonic() - lost < 30, "the piece does not wait for a node that Ray knows to be dead"
    assert (found["error"], found["failures"]) == (None, [])
    assert written(tmp_path) == set(every)
    assert len(found["retried"]) == 1
