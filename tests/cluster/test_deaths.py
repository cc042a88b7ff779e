"""What becomes of work whose workers or nodes die: all of it is done but what is at fault, which fails by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.cluster import number_work
from tests.cluster.conftest import SimulatedCluster
from tests.cluster.number_work import DEADLY, SLOW, WRONG


def start(address: str, root: Path, **call: Any) -> subprocess.Popen[str]:
    words = [sys.executable, number_work.__file__, address, str(root), json.dumps(call)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.count("\n") == 1, "Ray's messages about deaths are not printed"
    return dict(json.loads(stdout))


def written(root: Path) -> set[int]:
    return {int(path.name) for path in (root / "experiments" / "exp").iterdir() if path.name.isdecimal()}


def begun(root: Path) -> Counter[int]:
    return Counter(map(int, (root / "begun").read_text().split()))


def test_of_a_piece_that_kills_its_workers_only_the_prompt_at_fault_fails_by_name(
    ray_address: str, tmp_path: Path
) -> None:
    deadly = DEADLY + 5
    found = report_of(start(ray_address, tmp_path, numbers=[*range(5), deadly, *range(6, 12)], most=8, workers=2))
    assert found["error"] is None
    assert [(each["what"], each["reason"][:23]) for each in found["failures"]] == [
        (f"[{deadly}]", "its worker died 3 times")
    ]
    assert written(tmp_path) == {*range(5), *range(6, 12)}
    assert found["prompts"] == 11
    # Twice in the piece of eight, in its half and in its quarter, and three times alone.
    assert begun(tmp_path)[deadly] == 2 + 2 + 2 + 3
    assert Counter(found["retried"]) == {
        str([*range(5), deadly, 6, 7]): 2, str([4, deadly, 6, 7]): 2, str([4, deadly]): 2, str([deadly]): 2,
    }  # fmt: skip


def test_workers_that_die_of_everything_end_the_run(ray_address: str, tmp_path: Path) -> None:
    every = range(DEADLY, DEADLY + 50)
    found = report_of(start(ray_address, tmp_path, numbers=[*every], most=1, workers=1, _MOST_DEATHS=0))
    assert found["error"].startswith("ClusterError: 2 workers died in a row, the last one with: ")
    assert begun(tmp_path) == {DEADLY: 3}


def test_an_unexpected_error_ends_the_run_and_is_not_tried_again(ray_address: str, tmp_path: Path) -> None:
    found = report_of(start(ray_address, tmp_path, numbers=[WRONG], most=1, workers=1))
    assert "a bug" in found["error"]
    assert begun(tmp_path)[WRONG] == 1


def test_work_on_a_node_that_leaves_is_done_by_the_others(cluster: SimulatedCluster, tmp_path: Path) -> None:
    """Its worker waits for a node with room for it, which there is none of: an idle worker takes its piece over."""
    cluster.with_third_node()
    every = [SLOW + number for number in range(15)]
    running = start(cluster.address, tmp_path, numbers=every, most=3, workers=3, _SILENCE=2)
    while not (tmp_path / "begun").exists() or len(begun(tmp_path)) < 4:
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    cluster.lose_third_node(gracefully=True)
    found = report_of(running)
    assert (found["error"], found["failures"]) == (None, [])
    assert written(tmp_path) == set(every)
    assert len(found["retried"]) == 1
