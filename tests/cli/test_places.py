"""Folders that cannot be used as they are: each command says in one line which, and why."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tlcapture.errors import InputError, NoSpaceError, StorageError
from tlcapture.names import Trait
from tlcapture.page.contents import Contents
from tlcapture.prompts.prompt_sets import read_prompt_set
from tlcapture.storage import files, folders, whole_folders
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout, existing_experiments
from tlcapture.storage.locks import locked
from tlcapture.text import shell_join

Command = Callable[..., Result]
STORED = Path(__file__).parents[1] / "stored" / "hooked-3.9.0"


@pytest.fixture
def exp(root: Path) -> Path:
    """A stored experiment in the root."""
    return Path(shutil.copytree(STORED, root / "experiments" / "exp"))


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths that may not be listed or removed, as those of another user; tests may run as root, who may all."""
    refused: set[str] = set()

    def refusing(function: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path | str, *more: object, **options: object) -> object:
            if str(path) in refused:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *more, **options)

        return call

    monkeypatch.setattr(folders, "scandir", refusing(os.scandir))
    monkeypatch.setattr(Path, "unlink", refusing(Path.unlink))
    monkeypatch.setattr(Path, "is_dir", refusing(Path.is_dir))
    return refused


def one_line(result: Result) -> str:
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("words", ["list --experiment exp", "view --experiment exp --export x.html"])
def test_an_experiment_of_another_user_is_named(tlcapture: Command, exp: Path, closed: set[str], words: str) -> None:
    closed.add(str(exp))
    assert one_line(tlcapture(*words.split())) == f"error: {exp}: Permission denied"
    closed.clear()
    closed.add(str(exp.parent))
    assert one_line(tlcapture("list")) == f"error: {exp.parent}: Permission denied"


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(exp: Path, root: Path, closed: set[str]) -> None:
    found = Layout(root, "exp")
    (name,) = found.captured_prompt_sets()
    assert found.captured(name)
    closed.add(str(exp / "inference" / "raw" / "residual" / name))
    with pytest.raises(StorageError, match=f"residual/{name}: Permission denied"):
        found.captured(name)
    assert found.traits()
    closed.add(str(exp / "extraction" / "tone"))
    with pytest.raises(StorageError, match="extraction/tone: Permission denied"):
        found.traits()


def test_an_experiment_that_is_closed_to_others_is_named(
    tlcapture: Command, exp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr("os.access", lambda path, *more, **how: path != exp and access(path, *more, **how))
    for words in ("list --experiment exp", "project --experiment exp --all-prompt-sets"):
        assert one_line(tlcapture(*words.split())) == f"error: {exp}: cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("project --experiment exp --prompt-set short", "experiments/exp"),
        ("capture --experiment new --prompt x", "experiments"),
        ("extract --experiment new --traits style/formality", "experiments"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_named_before_any_work(
    tlcapture: Command,
    exp: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    words: str,
    where: str,
) -> None:
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode, **how: not mode & os.W_OK and access(path, mode, **how))
    before = sorted(root.rglob("*"))
    more = () if words.startswith("project") else ("--model", tiny_folder)
    result = tlcapture(*words.split(), *more)
    assert (result.exit_code, result.stderr) == (1, f"error: {root / where}: cannot be written to\n")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("word", ["two\nlines", "tab\tand 'quote' \\ and \x1b[2J", "plain", "a b", "\udcff", "\u2028"])
def test_a_command_line_to_run_next_is_one_line_that_bash_reads_back(word: str) -> None:
    line = shell_join(["printf", "%s", word])
    assert line.isprintable()
    said = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert said == word.encode("utf-8", "surrogateescape")


def test_the_next_command_names_a_root_of_two_lines(tlcapture: Command, exp: Path, root: Path) -> None:
    folder = root / "two\nlines"
    (folder / "experiments").mkdir(parents=True)
    exp.rename(folder / "experiments" / "exp")
    assert tlcapture("list", "--root", folder).stdout.endswith(f"--root $'{root}/two\\nlines'\n")


def test_a_list_names_an_experiment_that_cannot_be_read_and_shows_the_others(
    tlcapture: Command, exp: Path, root: Path
) -> None:
    shutil.copytree(exp, root / "experiments" / "bad")
    (root / "experiments" / "bad" / "config.json").write_text("{")
    (root / "experiments" / "not a name").mkdir()
    result = tlcapture("list")
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["experiment", "exp"]
    first, second = result.stderr.splitlines()
    assert first.startswith(f"failed: {root}/experiments/bad/config.json: ")
    assert second.startswith("failed: experiment 'not a name' is not a safe file name")


def test_a_file_that_cannot_be_removed_is_an_error_of_the_package(tmp_path: Path, closed: set[str]) -> None:
    (tmp_path / "one").touch()
    closed.add(str(tmp_path / "one"))
    with pytest.raises(StorageError, match="one: cannot be removed: Permission denied"):
        files.remove([tmp_path / "one"])


@pytest.mark.parametrize("words", ["list", "capture --prompt x", "traits list --experiment x"])
def test_a_current_folder_that_is_gone_is_one_line(
    tlcapture: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = tlcapture(*words.split())
    monkeypatch.chdir(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == "error: the current folder does not exist any more: change to another one\n"


def test_a_root_in_a_home_folder_is_found_and_an_unknown_one_refused(
    tlcapture: Command, exp: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert "exp" in tlcapture("list", f"--root=~/{root.name}").stdout
    result = tlcapture("list", "--root", "~nobody-of-this-name/x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ~nobody-of-this-name/x: no home folder is known: write ./~nobody")
    (root / "~nobody-of-this-name").mkdir()
    monkeypatch.chdir(root)
    said = tlcapture("list", "--root", "./~nobody-of-this-name").stdout
    assert f" --root '{root}/~nobody-of-this-name' " in said
    monkeypatch.setenv("TLCAPTURE_ROOT", "~nobody-of-this-name")
    assert tlcapture("list").exit_code == 2


def test_a_cache_that_cannot_be_made_is_told_with_what_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be created: Not a directory: set TLCAPTURE_CACHE to another folder"):
        whole_folders.write_folder(tmp_path / "file" / "made", lambda folder: None)


def put(what: str, place: Path) -> None:
    """Put a file or a link where something else is expected."""
    if place.exists():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.parent.mkdir(parents=True, exist_ok=True)
    if what == "a file":
        place.touch()
    else:
        place.symlink_to("/no/such/disk" if what == "a dangling link" else place.name)


SAYS = {
    "a file": "expected a folder, found a file: move it",
    "a dangling link": "a link to /no/such/disk, which does not exist: mount the disk it is on",
    "a link to itself": "expected a folder, found a link that leads back to itself: remove it",
}


@pytest.mark.parametrize("what", SAYS)
@pytest.mark.parametrize("place", ["experiments", "experiments/exp", "experiments/exp/extraction"])
def test_what_is_in_the_place_of_a_folder_is_not_taken_for_an_empty_one(
    tlcapture: Command, exp: Path, root: Path, place: str, what: str
) -> None:
    put(what, root / place)
    for words in (
        "list",
        "view",
        "capture --prompt x",
        "extract --traits style/formality",
        "project --all-prompt-sets",
    ):
        if place != "experiments/exp/extraction" or words == "list":
            said = one_line(tlcapture(*words.split(), "--experiment", "exp"))
            assert said == f"error: {root / place}: {SAYS[what]}"
    if (place, what) != ("experiments/exp", "a file"):  # as a note that lies beside experiments
        assert tlcapture("list").stderr.endswith(f": {root / place}: {SAYS[what]}\n")


def test_a_link_that_leads_to_nothing_hides_no_other_experiment(tlcapture: Command, exp: Path, root: Path) -> None:
    put("a dangling link", root / "experiments" / "away")
    put("a link to itself", root / "experiments" / "odd")
    assert existing_experiments(root) == ["away", "exp", "odd"]
    result = tlcapture("list")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["experiment", "exp"]
    assert len(result.stderr.splitlines()) == 2
    listed = {each["name"]: each for each in Contents(root).experiments()}
    assert listed["exp"]["prompt_sets"] == ["short"]
    assert listed["away"]["problem"].startswith("experiments/away: a link to /no/such/disk")


@pytest.mark.parametrize("what", SAYS)
@pytest.mark.parametrize("place", ["datasets", "datasets/inference", "datasets/inference/single_trait.json"])
def test_a_prompt_set_of_the_root_that_is_lost_is_not_replaced_by_the_packaged_one(
    root: Path, place: str, what: str
) -> None:
    put(what, root / place)
    with pytest.raises(InputError, match=f"^{root / place}: "):
        read_prompt_set(Datasets(root), "single_trait")


@pytest.mark.parametrize("what", SAYS)
@pytest.mark.parametrize("place", ["datasets", "datasets/traits/behavioral", "datasets/traits/behavioral/refusal"])
def test_examples_of_the_root_that_are_lost_are_not_replaced_by_the_packaged_ones(
    root: Path, place: str, what: str
) -> None:
    put(what, root / place)
    with pytest.raises(StorageError, match=f"^{root / place}: "):
        Datasets(root).trait_folder(Trait("behavioral", "refusal"))


def test_of_many_names_the_most_similar_ones_are_listed(tlcapture: Command, root: Path) -> None:
    for number in range(200):
        (root / "experiments" / f"run_{number:03}").mkdir(parents=True)
    says = tlcapture("list", "--experiment", "run_1500").stderr
    assert ": did you mean 'run_150'? existing experiments: run_150, run_" in says
    assert says.endswith(" and 190 more\n")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (OSError(28, "Error writing bytes to file"), NoSpaceError, "cannot be created: No space left on device"),
        (RuntimeError("I/O error: No space left (os error 28)"), NoSpaceError, "cannot be created: No space left on"),
        (OSError("odd"), StorageError, "cannot be created: odd"),
    ],
)
def test_a_folder_for_which_there_is_no_space_is_named(
    tmp_path: Path, error: Exception, kind: type[StorageError], reason: str
) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    with pytest.raises(kind, match=f"^{tmp_path}/out: {reason}"):
        whole_folders.write_folder(tmp_path / "out", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_folder_that_is_not_complete_is_named_by_its_place(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").mkdir()
        files.write_bytes(folder / "a", b"")

    with pytest.raises(StorageError, match=f"^{tmp_path}/out/a: cannot be written: it is a folder"):
        whole_folders.write_folder(tmp_path / "out", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a file", "a link to itself"])
def test_what_is_in_the_place_of_the_folder_of_a_new_file_is_named(root: Path, what: str) -> None:
    put(what, root / "runs")
    with pytest.raises(StorageError, match=f"^{root}/runs/a/b.json: cannot be written: {root}/runs: {SAYS[what]}"):
        files.write_json(root / "runs" / "a" / "b.json", {})
    with (
        pytest.raises(StorageError, match=f"^{root}/runs/a.lock: cannot be locked: {root}/runs: {SAYS[what]}"),
        locked(root / "runs" / "a.lock"),
    ):
        pass
