"""Unreadable files of every kind are kept; a replay and `--skip-existing` leave all other files as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from click.testing import Result

from tests.cli.test_overwrite import VIEWS, files_of

Run = Callable[..., Result]

KINDS = {
    "attention": "analysis/per_token/short/2_attention.json",
    "lens": "analysis/per_token/short/2_logit_lens.json",
    "internals": "inference/raw/internals/short/2_L1.pt",
    "projection": "inference/tone/loud/residual_stream/short/2.json",
}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "cut behind an entry": lambda path: path.write_bytes(_cut_behind_an_entry(path.read_bytes())),
    "empty": lambda path: path.write_bytes(b""),
    "notes": lambda path: path.write_text("some notes\n"),
    "of another tool": lambda path: (
        torch.save({"acts": torch.ones(3)}, path) if path.suffix == ".pt" else path.write_text('{"scores": [1, 2]}')
    ),
}


def _cut_behind_an_entry(data: bytes) -> bytes:
    """JSON that ends where an entry ends, and no other closing bracket."""
    return data[: data.rindex(b',{"token_idx"')] if b',{"token_idx"' in data else data[:-3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made") / "experiments"


@pytest.fixture
def folder(made: Path, capture: Run, extract: Run, data: Path) -> Path:
    """An experiment with three captured prompts and every file derived from them."""
    if not made.exists():
        assert extract("--component", "residual").exit_code == 0
        assert capture(*VIEWS).exit_code == 0
        shutil.copytree(data / "experiments", made)
    else:
        shutil.copytree(made, data / "experiments")
    return data / "experiments" / "exp"


def all_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file of the experiment but records and locks of runs."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in ("runs", ".locks")
    }


WORDS: dict[str, tuple[str, ...]] = {"plain": (), "skip-existing": ("--skip-existing",)}
# Every kind of file with every damage, in turn without and with the option: each kind and each damage with both.
CASES = [
    pytest.param(kind, damage, words, id=f"{kind}-{damage}-{name}")
    for (kind, damage), (name, words) in zip(product(KINDS, DAMAGES), cycle(WORDS.items()))
]


@pytest.mark.parametrize(("kind", "damage", "words"), CASES)
def test_a_capture_fails_the_prompt_of_an_unreadable_file_and_keeps_all_its_files(
    capture: Run, folder: Path, data: Path, kind: str, damage: str, words: tuple[str, ...]
) -> None:
    path = folder / KINDS[kind]
    DAMAGES[damage](path)
    before = files_of(data)
    assert len(before) == 6
    result = capture(*words, *VIEWS)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("failed"))
    assert line.startswith(f"failed: short/2: {path}: ")
    assert line.endswith(": use --overwrite to replace or remove it")
    assert result.exit_code == 1
    assert files_of(data) == before
    assert "would fail: short/2: " in capture(*words, *VIEWS, "--dry-run").output


RAW = "inference/raw/residual/short/2.pt"


@pytest.mark.parametrize("kind", [RAW, *KINDS.values()])
@pytest.mark.parametrize("words", [(), ("--skip-existing",)], ids=["plain", "skip-existing"])
def test_a_link_to_what_is_not_there_is_kept_with_all_that_was_made_from_it(
    capture: Run, folder: Path, data: Path, kind: str, words: tuple[str, ...]
) -> None:
    path, target = folder / kind, folder / "unmounted" / "2"
    path.unlink()
    path.symlink_to(target)
    before = files_of(data)
    result = capture(*words, *VIEWS)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("failed"))
    assert line.startswith(
        f"failed: short/2: {path}: a link to {target}, which does not exist: mount the disk it is on: use"
    )
    assert path.is_symlink() and files_of(data) == before
    assert "would fail: short/2: " in capture(*words, *VIEWS, "--dry-run").output
    assert capture(*words, *VIEWS, "--overwrite").exit_code == 0
    assert path.is_file() and not path.is_symlink()


@pytest.mark.parametrize("words", [("--overwrite",), ("--skip-existing",)], ids=["overwrite", "skip-existing"])
@pytest.mark.parametrize("kind", [RAW, *KINDS.values()])
def test_a_folder_in_the_place_of_a_file_fails_its_prompt_and_is_never_removed(
    capture: Run, folder: Path, data: Path, kind: str, words: tuple[str, ...]
) -> None:
    path = folder / kind
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("text")
    before = files_of(data)
    result = capture(*words, *VIEWS)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("failed"))
    assert line == f"failed: short/2: {path}: expected a file, found a folder: move it"
    assert result.exit_code == 1
    assert files_of(data) == before
    assert (path / "mine").read_text() == "text"


@pytest.mark.parametrize("kind", ["attention", "lens", "internals"])
@pytest.mark.parametrize("words", [(), ("--skip-existing",)], ids=["plain", "skip-existing"])
def test_a_replay_keeps_a_link_to_what_is_not_there(
    capture: Run, folder: Path, kind: str, words: tuple[str, ...]
) -> None:
    path = folder / KINDS[kind]
    path.unlink()
    path.symlink_to(folder / "unmounted")
    result = capture("--replay", *words, *VIEWS)
    assert f"failed: short/2: {path}: a link to {folder / 'unmounted'}, which does not exist" in result.stderr
    assert result.exit_code == 1
    assert path.is_symlink()


@pytest.mark.parametrize(
    "command",
    [
        ("project", "--dynamics-only", "--prompt-set", "short"),
        ("project", "--skip-existing", "--prompt-set", "short"),
        ("view", "--export", "page.html"),
        ("export", "--format", "json", "--to", "exported"),
    ],
    ids=["dynamics-only", "project", "view", "export"],
)
def test_a_projection_that_links_to_what_is_not_there_is_named_and_the_others_are_done(
    tlcapture: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    path = folder / KINDS["projection"]
    path.unlink()
    path.symlink_to(folder / "unmounted")
    monkeypatch.chdir(tmp_path)
    result = tlcapture(*command, "--experiment", "exp")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("failed"))
    assert f"{path}: a link to {folder / 'unmounted'}, which does not exist: mount the disk it is on" in line
    assert result.exit_code == 1
    assert path.is_symlink()


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
@pytest.mark.parametrize("kind", list(KINDS))
def test_overwrite_makes_an_unreadable_file_again(
    capture: Run, folder: Path, data: Path, kind: str, words: tuple[str, ...]
) -> None:
    path, others = folder / KINDS[kind], [files_of(data, number) for number in "13"]
    good = path.read_bytes()
    DAMAGES["truncated"](path)
    result = capture(*words, *VIEWS, "--overwrite")
    assert result.exit_code == 0, result.output
    assert len(path.read_bytes()) == pytest.approx(len(good), rel=0.05)
    if words:
        assert [files_of(data, number) for number in "13"] == others
        assert "wrote 1 file" in result.output
    assert "3 prompts skipped" in capture("--skip-existing", *VIEWS).output


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_project_fails_the_prompt_of_an_unreadable_projection_and_replaces_it_with_overwrite(
    tlcapture: Run, folder: Path, data: Path, damage: str, words: tuple[str, ...]
) -> None:
    path = folder / KINDS["projection"]
    DAMAGES[damage](path)
    before = files_of(data)
    command = ("project", "--experiment", "exp", "--prompt-set", "short", "--layer", 1, *words)
    result = tlcapture(*command)
    assert result.exit_code == 1
    assert f"failed: short/2: {path}: " in result.stderr
    assert files_of(data) == before
    assert tlcapture(*command, "--overwrite").exit_code == 0
    assert json.loads(path.read_text())["metadata"]["prompt_id"] == "2"


def test_a_replay_leaves_projections_and_all_else_as_it_is(tlcapture: Run, capture: Run, folder: Path) -> None:
    chosen = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--layer", 0)
    assert chosen.exit_code == 0
    before = all_files(folder)
    result = capture("--replay", "--attention")
    assert result.exit_code == 0, result.output
    after = all_files(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        f"analysis/per_token/short/{number}_attention.json" for number in "123"
    }
    assert after.keys() == before.keys()
    assert "rose most" not in result.output
    for path in folder.glob("analysis/per_token/short/*_attention.json"):
        path.unlink()
    assert capture("--replay", "--attention", "--skip-existing").exit_code == 0
    assert all_files(folder).keys() == before.keys()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "--replay computes only what is asked for: add --attention, --logit-lens or --layer-internals"),
        (("--attention", "--layer", 1), "--replay leaves projections as they are"),
        (("--attention", "--method", "probe"), "--replay leaves projections as they are"),
    ],
)
def test_a_replay_that_asks_for_nothing_or_for_projections_is_refused(
    capture: Run, folder: Path, words: tuple[object, ...], expected: str
) -> None:
    before = all_files(folder)
    result = capture("--replay", *words)
    assert result.exit_code == 2
    assert expected in result.output
    assert all_files(folder) == before


def test_skip_existing_keeps_projections_onto_a_chosen_vector(tlcapture: Run, capture: Run, folder: Path) -> None:
    assert tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--layer", 0).exit_code == 0
    (folder / KINDS["projection"]).unlink()
    before = all_files(folder)
    assert capture("--skip-existing", *VIEWS).exit_code == 0
    after = all_files(folder)
    assert {name for name in after if after[name] != before.get(name)} == {KINDS["projection"]}
    asked = capture("--skip-existing", *VIEWS, "--layer", 1)
    assert "wrote 5 files" in asked.output  # the one above is onto layer 1 already


def test_a_dry_run_lists_what_would_be_replaced_and_removed(capture: Run, folder: Path, data: Path) -> None:
    def listed(*words: object) -> tuple[set[str], set[str]]:
        estimate = json.loads(capture("--dry-run", "--json", *words).stdout)["estimate"]
        return set(estimate["replaces"]), set(estimate["removes"])

    every = {name for name in all_files(folder) if "/short/" in name}
    assert len(every) == 18
    before = all_files(folder)
    replaced, removed = listed("--attention", "--max-new-tokens", 3)
    assert removed == {name for name in every if "lens" in name or "internals" in name}
    assert replaced == every - removed
    assert listed("--skip-existing", *VIEWS) == (set(), set())
    assert listed("--replay", "--attention") == ({name for name in every if "attention" in name}, set())
    assert listed("--skip-existing", *VIEWS, "--layer", 0) == ({name for name in every if "/tone/" in name}, set())
    text = capture("--dry-run", "--attention").stdout
    assert "would replace: inference/raw/residual/short/1.pt\n" in text
    assert "would remove, unless the tokens stay the same: inference/raw/internals/short/1_L1.pt\n" in text
    assert all_files(folder) == before
    done = capture("--attention", "--max-new-tokens", 3)
    after = all_files(folder)
    assert done.exit_code == 0
    assert {name for name in before if name not in after} == removed
    assert {name for name in after if after[name] != before[name] and "/short/" in name} == replaced
