"""An unreadable file at the path of a capture is kept, with all derived files, unless `--overwrite` is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from tests.input import captures
from tlcapture.captures.capture import Capture

Run = Callable[..., Result]

FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another tool": (
        lambda path: torch.save({"activations": torch.ones(3, 4), "text": "mine"}, path),
        "raw residual file",
    ),
    "of another version": (
        lambda path: torch.save({**captures.content(), "format_version": 99}, path),
        "format version 99, this tlcapture reads 1",
    ),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
        "cannot be read as a tensor file",
    ),
    "not an archive": (lambda path: path.write_text("some notes\n"), "cannot be read as a tensor file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a tensor file"),
}
VIEWS = ("--attention", "--logit-lens", "--layer-internals", 1)


def files_of(data: Path, prompt_id: str = "2") -> dict[Path, tuple[bytes, int]]:
    """All files of a prompt, including markers, with their content and modification time."""
    folder = data / "experiments" / "exp"
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name == "short" and path.name.lstrip(".")[:1] == prompt_id
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the experiments from which all tests start, created by the first test."""
    return tmp_path_factory.mktemp("made") / "experiments"


@pytest.fixture
def captured(made: Path, capture: Run, extract: Run, data: Path) -> None:
    """Three captured prompts with all derived files."""
    if made.exists():
        shutil.copytree(made, data / "experiments")
        return
    assert extract().exit_code == 0
    assert capture(*VIEWS).exit_code == 0
    shutil.copytree(data / "experiments", made)


@pytest.fixture
def reason(request: pytest.FixtureRequest, captured: None, raw: Path) -> str:
    """Replaces the second prompt's capture by an unreadable file; returns the expected reason in the error."""
    damage, reason = FILES[getattr(request, "param", "truncated")]
    damage(raw / "2.pt")
    return reason


each_file = pytest.mark.parametrize("reason", list(FILES), indirect=True)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        *((name, words) for name in FILES for words in ((), ("--skip-existing",))),
        ("of another tool", ("--skip-existing", "--no-project")),
        ("of another tool", ("--projections-only",)),
        ("truncated", ("--projections-only", "--skip-existing")),
    ],
    indirect=["reason"],
)
def test_its_prompt_fails_by_name_and_its_files_are_not_changed(
    reason: str, words: tuple[str, ...], capture: Run, data: Path, raw: Path
) -> None:
    before, others = files_of(data), [files_of(data, number) for number in "13"]
    assert len(before) == 6  # raw, two projections, attention, logit lens, internals
    views = () if "--projections-only" in words else VIEWS
    result = capture(*words, *views)
    (line,) = (line for line in result.stderr.splitlines() if "2.pt" in line)
    assert line.startswith(f"failed: short/2: {raw / '2.pt'}: ")
    assert reason in line
    assert line.endswith(": use --overwrite to replace it and all files derived from it")
    assert result.exit_code == 1
    assert files_of(data) == before
    if not words:  # the other prompts were captured again
        assert all(files_of(data, number) != other for number, other in zip("13", others, strict=True))


@each_file
@pytest.mark.parametrize("skipping", [("--skip-existing",), ()], ids=["skip-existing", "plain"])
def test_overwrite_replaces_it_and_its_derived_files(
    skipping: tuple[str, ...], reason: str, capture: Run, data: Path, raw: Path
) -> None:
    before, others = files_of(data), [files_of(data, number) for number in "13"]
    result = capture(*skipping, "--overwrite", "--attention")
    assert result.exit_code == 0, result.output
    assert Capture.open(raw / "2.pt").metadata["prompt_text"] == "what?"
    after = files_of(data)
    gone = {path.name for path in before.keys() - after.keys()}
    assert gone == {"2_logit_lens.json", "2_L1.pt"}  # not requested, and derived from the replaced file
    assert all(after[path] != before[path] for path in after)
    if skipping:
        assert [files_of(data, number) for number in "13"] == others
        assert "wrote 4 files" in result.output
    again = capture("--skip-existing", "--attention")
    assert again.exit_code == 0
    assert "3 prompts skipped: nothing was missing" in again.output


def test_a_dry_run_lists_the_prompts_that_would_fail(reason: str, capture: Run, data: Path, raw: Path) -> None:
    before = files_of(data)
    for words, n_prompts in (((), 2), (("--skip-existing",), 0)):
        lines = capture("--dry-run", *words).stdout.splitlines()
        assert lines[0].startswith(f"{n_prompts} prompts to capture")
        (line,) = (line for line in lines if line.startswith("would fail"))
        assert line.startswith(f"would fail: short/2: {raw / '2.pt'}: ")
        assert reason in line
        (failure,) = json.loads(capture("--dry-run", "--json", *words).stdout)["estimate"]["failures"]
        assert line == f"would fail: {failure['what']}: {failure['reason']}"
    text = capture("--dry-run", "--skip-existing", "--overwrite").stdout
    assert text.startswith("1 prompt to capture")
    assert "would fail" not in text
    assert files_of(data) == before


def test_if_all_prompts_would_fail_each_is_named_and_the_model_is_not_loaded(capture: Run, raw: Path) -> None:
    raw.mkdir(parents=True)
    for number in "123":
        (raw / f"{number}.pt").write_text("mine")
    result = capture()
    assert result.exit_code == 1
    assert [line.partition(": /")[0] for line in result.stderr.splitlines() if line.startswith("failed")] == [
        f"failed: short/{number}" for number in "123"
    ]
    assert "loading" not in result.output
    assert all((raw / f"{number}.pt").read_text() == "mine" for number in "123")


def test_replay_asks_for_another_capture(reason: str, capture: Run, data: Path) -> None:
    before = files_of(data)
    result = capture("--replay", "--attention")
    assert result.exit_code == 1
    assert reason in result.stderr
    assert ": capture it again with --overwrite" in result.stderr
    assert files_of(data) == before
    refused = capture("--replay", "--overwrite")
    assert refused.exit_code == 2
    assert "--replay does not change raw residuals: leave it out to use --overwrite" in refused.output


def test_projections_only_removes_it_and_writes_projections(reason: str, capture: Run, data: Path, raw: Path) -> None:
    for number in "13":
        (raw / f"{number}.pt").unlink()
    result = capture("--projections-only", "--skip-existing", "--overwrite")
    assert result.exit_code == 0, result.output
    assert not list(raw.iterdir())
    assert {path.suffix for path in files_of(data)} == {".json"}
    assert len(files_of(data)) == 2
    assert "3 prompts skipped" in capture("--projections-only", "--skip-existing").output


def test_overwrite_does_not_remove_a_folder_at_the_path_of_a_capture(capture: Run, raw: Path) -> None:
    (raw / "2.pt").mkdir(parents=True)
    for words in ((), ("--skip-existing", "--overwrite")):
        result = capture(*words)
        assert result.exit_code == 1
        assert f"failed: short/2: {raw / '2.pt'}: expected a file, found a folder: move it" in result.stderr
        assert not (raw / ".2.unfinished").exists()


def test_a_file_that_appears_during_the_run_is_not_replaced(
    capture: Run, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcapture.commands.capturing import worker as capture_worker

    original = capture_worker.generate_or_force

    def generate(*args: object, **options: object) -> object:
        raw.mkdir(parents=True)
        (raw / "2.pt").write_text("mine")
        return original(*args, **options)

    monkeypatch.setattr(capture_worker, "generate_or_force", generate)
    result = capture()
    assert result.exit_code == 1
    assert "failed: short/2: " in result.stderr
    assert (raw / "2.pt").read_text() == "mine"
    assert sorted(path.name for path in raw.iterdir()) == ["1.pt", "2.pt", "3.pt"]
