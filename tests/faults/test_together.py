"""Simultaneous runs on one experiment: no file is damaged or lost, and no lock outlives its process."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evidence import Evidence
from tests.faults.commands import Command, contents
from tests.faults.conftest import Start

RESIDUAL = ("--component", "residual")


def test_captures_of_the_same_prompt_set_run_one_after_another(
    start: Start, fresh: Path, uninterrupted: dict[str, Any], evidence: Evidence
) -> None:
    lock = fresh / "experiments" / "exp" / ".locks" / "captures-of-short.lock"
    first = start("--skip-existing", before=held_until(fresh / "go"))
    first.wait_for(lock.exists)
    second, third = start("--skip-existing"), start()
    second.wait_for(lambda: "waiting" in second.stdout)
    (fresh / "go").touch()
    ended = [first.end(), second.end(), third.end()]
    assert [each.code for each in ended] == [0, 0, 0], ended
    assert "another run is writing captures of short in exp: waiting for it to end" in ended[1].stdout
    assert "2 prompts skipped: nothing was missing" in ended[1].stdout
    assert contents(fresh / "experiments" / "exp") == uninterrupted
    evidence.survived(
        "three simultaneous captures of one prompt set",
        "started together, two with --skip-existing",
        "they wait for each other and report it; with --skip-existing the later run has nothing to do; the files "
        "of an uninterrupted run",
    )


def held_until(flag: Path) -> Callable[[], None]:
    """A function that makes a capture wait with its lock held, before its first file, until another file exists."""

    def hold() -> None:
        from tlcapture.commands.capturing import worker as capture_worker

        write = capture_worker.write_capture

        def held(*args: Any, **options: Any) -> Any:
            deadline = time.monotonic() + 60
            while not flag.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            return write(*args, **options)

        capture_worker.write_capture = held

    return hold


def test_shards_of_one_prompt_set_run_at_the_same_time(start: Start, fresh: Path, evidence: Evidence) -> None:
    lock = fresh / "experiments" / "exp" / ".locks" / "captures-of-short.shards" / "shard-of-2-1.lock"
    first = start("--shard", "1/2", before=held_until(fresh / "go"))
    first.wait_for(lock.exists)
    second = start("--shard", "2/2").end()
    whole = start("--skip-existing")
    whole.wait_for(lambda: "waiting" in whole.stdout)
    (fresh / "go").touch()
    ended = [second, first.end(), whole.end()]
    assert [each.code for each in ended] == [0, 0, 0], ended
    assert "waiting" not in ended[0].stdout + ended[1].stdout
    assert "another run is writing captures of short in exp: waiting for it to end" in ended[2].stdout
    assert "2 prompts skipped: nothing was missing" in ended[2].stdout
    found = contents(fresh / "experiments" / "exp")
    assert {f"inference/raw/residual/short/{number}.pt" for number in (1, 2)} <= set(found)
    evidence.survived(
        "two simultaneous shards of one prompt set, and a run of the whole set",
        "--shard 1/2, --shard 2/2 and --skip-existing",
        "the shards do not wait for each other; the run of the whole set waits for both and has nothing to do",
    )


def test_the_lock_of_a_killed_run_blocks_no_other(start: Start, fresh: Path, evidence: Evidence) -> None:
    lock = fresh / "experiments" / "exp" / ".locks" / "captures-of-short.lock"
    killed = start(before=held_until(fresh / "never"))
    killed.wait_for(lock.exists)
    killed.send(signal.SIGKILL)
    killed.end()
    assert lock.exists()
    ended = start("--skip-existing").end()
    assert ended.code == 0
    assert "waiting" not in ended.stdout
    evidence.survived("a run killed while it holds a lock", "kill -9", "the next run does not wait")


def test_simultaneous_evaluations_lose_no_row(fresh: Path, tmp_path: Path, evidence: Evidence) -> None:
    common = ("--root", fresh, "--experiment", "exp")
    both = [
        Command(tmp_path / "output", "evaluate", *common, "--traits", trait, *RESIDUAL, before=lambda: slow_merge())
        for trait in ("tone/loud", "tone/warm")
    ]
    assert [each.end().code for each in both] == [0, 0]
    evaluation = json.loads((fresh / "experiments" / "exp" / "extraction" / "extraction_evaluation.json").read_bytes())
    found = {row["trait"] for row in evaluation["all_results"]}
    assert found == {"tone/loud", "tone/warm"} == set(evaluation["best_vectors"])
    evidence.survived(
        "two simultaneous evaluations of different traits",
        "each delayed between reading and writing the file that they share",
        "the rows of both are in the file",
    )


def slow_merge() -> None:
    import time

    from tlcapture.commands.evaluating import entries as evaluation_entries

    merged = evaluation_entries.with_entries

    def slow(*args: Any) -> Any:
        content = merged(*args)
        time.sleep(1)
        return content

    evaluation_entries.with_entries = slow
