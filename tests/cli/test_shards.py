"""`--shard i/n`: each run captures its share; together they equal a single run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from tlcapture.captures.capture import Capture
from tlcapture.storage.files import read_json

Run = Callable[..., Result]
GREEDY = ("--temperature", 0)


def test_shards_capture_disjoint_prompts_and_all_of_them_together(
    capture: Run, extract: Run, raw: Path, projected: Path, data: Path
) -> None:
    extract()
    capture(*GREEDY)
    whole = {path.name: Capture.open(path).token_ids for path in raw.glob("*.pt")}
    for path in [*raw.glob("*.pt"), *projected.glob("*.json")]:
        path.unlink()
    seen: list[set[str]] = []
    for shard in ("2/2", "1/2"):
        assert capture(*GREEDY, "--shard", shard).exit_code == 0
        seen.append({path.stem for path in raw.glob("*.pt")})
    assert seen == [{"2"}, {"1", "2", "3"}]
    assert {path.name: Capture.open(path).token_ids for path in raw.glob("*.pt")} == whole
    assert {path.stem for path in projected.glob("*.json")} == {"1", "2", "3"}
    records = sorted(path.stem for path in (data / "experiments" / "exp" / "runs").glob("*-capture-*"))
    assert [name.rsplit("-", 1)[1] for name in records if "of" in name.rsplit("-", 1)[1]] in (
        ["1of2", "2of2"],
        ["2of2", "1of2"],
    )


def test_a_shard_is_taken_after_the_limit_and_can_skip_existing_captures(capture: Run, raw: Path) -> None:
    capture("--shard", "2/2", "--limit", 2)
    assert [path.stem for path in raw.glob("*.pt")] == ["2"]
    assert "1 prompt skipped" in capture("--shard", "2/2", "--skip-existing").output


def test_a_shard_without_prompts_does_nothing(capture: Run, raw: Path) -> None:
    assert capture("--shard", "4/4").exit_code == 0
    assert not raw.exists()


def test_project_takes_a_shard_of_the_captures(capture: Run, extract: Run, tlcapture: Run, projected: Path) -> None:
    extract()
    capture("--no-project")
    words = ("project", "--experiment", "exp", "--prompt-set", "short", "--layer", 1)
    assert tlcapture(*words, "--shard", "1/2").exit_code == 0
    assert sorted(path.stem for path in projected.glob("*.json")) == ["1", "3"]
    assert tlcapture(*words, "--shard", "2/2").exit_code == 0
    assert {read_json(path)["metadata"]["prompt_id"] for path in projected.glob("*.json")} == {"1", "2", "3"}


def test_a_wrong_shard_is_refused(capture: Run, raw: Path) -> None:
    done = capture("--shard", "0/4")
    assert done.exit_code == 2
    assert "'0/4' is not a shard: expected i/n with i from 1 to n" in done.output
