"""The index of finished files: what a finished prompt costs, and that it changes nothing else."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
from click.testing import Result

from tlcapture.commands.projecting import saved_summaries
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.errors import NoSpaceError
from tlcapture.storage.experiments import file_index
from tlcapture.storage.experiments.file_index import FileIndex, Learned, capture_set_of, remember
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState, write_bytes

Run = Callable[..., Result]
VIEWS = ("--attention", "--logit-lens", "--layer-internals", 1)
GREEDY = ("--temperature", 0)
FORMS: dict[str, tuple[Any, ...]] = {
    "json": VIEWS,
    "compact": (*VIEWS, "--format", "compact"),
    "some tokens": (*VIEWS, "--tokens", "last"),
    "attn_out": ("--capture-attn",),
    "only projections": ("--projections-only", "--attention"),
    "only projections, compact": ("--projections-only", "--format", "compact"),
    "samples": ("--samples", 2, "--temperature", 1),
    "steered": ("--steer", "tone/loud:+0.1@1", "--variant", "v"),
}


@pytest.fixture
def folder(data: Path) -> Path:
    return data / "experiments" / "exp"


@pytest.fixture
def index(folder: Path) -> Path:
    return folder / ".locks" / "files-of-short.index"


@pytest.fixture
def make(capture: Run, extract: Run, folder: Path) -> Run:
    """Capture the set `short` with two traits."""

    def run(*words: object) -> Result:
        if not folder.exists():
            extract()
        result = capture(*words)
        assert result.exit_code == 0, result.output
        return result

    return run


_RECORDING: list[Counter[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _RECORDING and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _RECORDING[-1][f"open {os.fsdecode(arguments[0])}"] += 1


@cache
def _watch() -> None:
    """Record what is opened from now on: a hook stays until the tests end."""
    sys.addaudithook(_audit)


@contextmanager
def file_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The calls on files by Python code: `stat PATH`, `open PATH` and so on."""
    found: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | os.PathLike):
                found[f"{name} {os.fspath(path)}"] += 1
            return original(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "readlink", "access", "scandir", "listdir"):
            patch.setattr(os, name, counting(name))
        _watch()
        _RECORDING.append(found)
        try:
            yield found
        finally:
            _RECORDING.pop()


def of_prompt(calls: Counter[str], prompt_id: str) -> list[str]:
    """The calls on files of a prompt, each as often as it was made."""
    names = (f"{prompt_id}.", f"{prompt_id}_", f".{prompt_id}.")
    return [call for call in calls.elements() if Path(call.partition(" ")[2]).name.startswith(names)]


def files_of_prompt(folder: Path, prompt_id: str) -> list[Path]:
    kept = (folder / "inference", folder / "analysis")
    found = (path for each in kept for path in each.rglob("*") if path.is_file())
    return [path for path in found if path.name.startswith((f"{prompt_id}.", f"{prompt_id}_"))]


def known(path: Path) -> dict[str, Any]:
    """What an index says of each file."""
    value = json.loads(path.read_bytes().partition(b"\n")[2])
    return {
        f"{folder}/{name}": (entry[:3], [value["parts"][part] for part in entry[3:]])
        for folder, files in value["folders"].items()
        for name, entry in files.items()
    }


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Modification time and inode of each file of the experiment that holds results."""
    kept = (folder / "inference", folder / "analysis")
    found = (path for each in kept for path in each.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


@pytest.mark.parametrize("form", FORMS)
def test_a_finished_prompt_costs_one_look_at_each_file_and_one_more_and_is_known_as_when_read(
    make: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    make(*FORMS[form])
    (index,) = (folder / ".locks").glob("files-of-*.index")
    written = known(index)
    assert written.keys() == states(folder).keys()
    with file_calls(monkeypatch) as calls:
        result = make(*FORMS[form], "--skip-existing")
    assert "wrote 0 files" in result.stdout, result.output
    names = ("2.s1", "2.s2") if form == "samples" else ("2",)
    for name in names:
        found = of_prompt(calls, name)
        assert len(found) <= len(files_of_prompt(folder, name)) + 1, found
        assert {call.partition(" ")[0] for call in found} <= {"lstat", "stat"}
    results = (f"open {folder}/inference/", f"open {folder}/analysis/")
    assert [call for call in calls if call.startswith(results)] == []
    index.unlink()
    assert "wrote 0 files" in make(*FORMS[form], "--skip-existing").stdout
    assert known(index) == written, "what is known at writing is what reading finds"


def test_a_finished_projection_costs_the_same(
    make: Run, tlcapture: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    with file_calls(monkeypatch) as calls:
        result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--skip-existing")
    assert "3 prompts skipped" in result.output and result.exit_code == 0
    assert 1 <= len(of_prompt(calls, "2")) <= len(files_of_prompt(folder, "2")) + 1
    assert not [call for call in calls if call.startswith(f"open {folder}/inference/")]


AGAIN: dict[str, tuple[Any, ...]] = {
    "the same": (),
    "more views": ("--layer-internals", 0),
    "a layer of attention": ("--attention-layers", 1),
    "more predictions": ("--lens-top", 7),
    "some tokens": ("--tokens", "last"),
    "attn_out": ("--capture-attn",),
    "other layers": ("--layers", "0,1"),
    "other vectors": ("--layer", 0),
    "other method": ("--method", "mean_diff"),
    "other sampling": ("--temperature", 0.5, "--seed", 3),
    "shorter": ("--max-new-tokens", 4),
    "system prompt": ("--system-prompt", "be brief"),
    "without a template": ("--no-chat-template",),
    "dtype": ("--save-dtype", "float32"),
    "compact": ("--format", "compact"),
    "no projections": ("--no-project",),
    "only projections": ("--projections-only", "--skip-existing"),
    "replay": ("--replay", "--layer-internals", 2),
}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("captured") / "exp"


@pytest.mark.parametrize("again", AGAIN)
def test_what_is_finished_is_decided_as_without_an_index(
    capture: Run, extract: Run, folder: Path, captured: Path, again: str
) -> None:
    base = ("--attention", "--logit-lens", *GREEDY)
    if not captured.exists():
        extract()
        assert capture(*base).exit_code == 0
        shutil.copytree(folder, captured)
        shutil.rmtree(folder)
    found = []
    for has_index in (True, False):
        shutil.copytree(captured, folder)
        (index,) = (folder / ".locks").glob("*.index")
        index.unlink()
        if has_index:
            assert capture(*base, "--skip-existing").exit_code == 0
            assert index.is_file()
        before = states(folder)
        result = capture(*base, "--skip-existing", *AGAIN[again])
        after = states(folder)
        same = {name for name, each in after.items() if before.get(name) == each}
        summary = [line.partition(" in ")[2].split(",")[1:-1] for line in result.stdout.splitlines() if "wrote" in line]
        found.append((same, after.keys(), before.keys(), result.exit_code, summary, result.stderr.count("failed")))
        shutil.rmtree(folder)
    assert found[0] == found[1]


def swapped(path: Path) -> None:
    """Put the capture of another prompt there, with the size and the modification time of the one before."""
    state, other = path.stat(), path.with_name("3.pt").read_bytes()
    path.write_bytes(other[: state.st_size].ljust(state.st_size, b"\0"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def overwritten(path: Path) -> None:
    """Change bytes in place, and set the modification time back."""
    state = path.stat()
    path.write_bytes(b"#" * state.st_size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(path: Path) -> None:
    """Put another file of the same size and time in its place."""
    state, other = path.stat(), path.with_suffix(".new")
    other.write_bytes(b"#" * state.st_size)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.rename(path)


PLACES = {
    "capture": "inference/raw/residual/short/2.pt",
    "projection": "inference/tone/loud/residual_stream/short/2.json",
    "attention": "analysis/per_token/short/2_attention.json",
    "internals": "inference/raw/internals/short/2_L1.pt",
}


CHANGES = [(place, change) for place in PLACES for change in (overwritten, replaced)] + [("capture", swapped)]


@pytest.mark.parametrize(("place", "change"), CHANGES)
def test_a_file_changed_behind_the_index_is_noticed(
    make: Run, capture: Run, folder: Path, place: str, change: Callable[[Path], None]
) -> None:
    make(*VIEWS)
    path = folder / PLACES[place]
    change(path)
    result = capture(*VIEWS, "--skip-existing")
    assert result.exit_code == 1, result.output
    assert f"failed: short/2: {path}" in result.stderr
    assert "2 prompts skipped" in result.stdout


@pytest.mark.parametrize("place", PLACES)
def test_a_file_removed_behind_the_index_is_made_again(make: Run, folder: Path, place: str) -> None:
    make(*VIEWS, *GREEDY)
    before = states(folder)
    (folder / PLACES[place]).unlink()
    result = make(*VIEWS, *GREEDY, "--skip-existing")
    changed = {name for name, each in states(folder).items() if before[name] != each}
    of_its_prompt = {name for name in before if Path(name).name[0] == "2"}
    assert changed == (of_its_prompt if place == "capture" else {PLACES[place]})
    assert "2 prompts skipped" in result.stdout
    assert "3 prompts skipped" in make(*VIEWS, *GREEDY, "--skip-existing").stdout


def test_a_projection_older_than_its_vector_is_made_again(make: Run, folder: Path) -> None:
    make()
    (vector,) = (folder / "extraction" / "tone" / "loud" / "vectors").glob("probe_layer1.pt")
    os.utime(vector)
    assert "wrote 3 files" in make("--skip-existing").stdout
    assert "wrote 0 files" in make("--skip-existing").stdout


def test_a_prompt_whose_run_was_killed_is_captured_again(make: Run, folder: Path) -> None:
    make()
    (folder / "inference" / "raw" / "residual" / "short" / ".2.unfinished").touch()
    assert "wrote 3 files" in make("--skip-existing").stdout


def flipped(data: bytes) -> bytes:
    """The same with another digit in one number."""
    place = data.rindex(b"1")
    return data[:place] + b"2" + data[place + 1 :]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "nested": lambda data: b"[" * 100_000,
    "not text": lambda data: b"\xff" + data,
    "a digit": flipped,
    "no files": lambda data: signed(b'{"version":1,"parts":[],"folders":{"inference/raw/residual/short":[]}}'),
    "another version": lambda data: signed(b'{"version":2,"parts":[],"folders":{}}'),
    "other parts": lambda data: signed(data.partition(b"\n")[2].replace(b'"parts":[', b'"parts":[7,"x",')),
}


def test_a_damaged_index_is_made_anew(make: Run, index: Path) -> None:
    make()
    before, content = known(index), index.read_bytes()
    for name, damaged in DAMAGED.items():
        index.write_bytes(damaged(content))
        assert "3 prompts skipped" in make("--skip-existing").stdout, name
        assert known(index) == before, name


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link that leads out": lambda path: path.symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_not_a_file_is_not_an_index(make: Run, index: Path, odd: str) -> None:
    """A pipe would be waited for without end."""
    make()
    index.unlink()
    ODD[odd](index)
    assert "3 prompts skipped" in make("--skip-existing").stdout


def signed(content: bytes) -> bytes:
    return file_index._digest(content) + b"\n" + content


def test_a_run_that_ends_before_its_index_is_written_loses_nothing(
    make: Run, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tlcapture.commands.capture.remember", lambda layout, learned: None)
        make()
    assert not index.exists()
    assert "wrote 0 files" in make("--skip-existing").stdout
    assert len(known(index)) == 9


def test_an_index_that_cannot_be_written_fails_nothing(make: Run, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise NoSpaceError(f"{path}: cannot be written: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(file_index, "write_bytes", full)
        make()
    assert not index.exists()


def test_runs_at_the_same_time_add_to_one_index(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "e")
    paths = [layout.residual("s", number) for number in range(40)]
    for path in paths:
        write_bytes(path, b"x")
    learned = {path: Learned(FileState.of(path.stat()), (orjson.dumps(path.stem),)) for path in paths}
    threads = [
        Thread(target=remember, args=(layout, {path: learned[path] for path in paths[start::8]})) for start in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = FileIndex(layout, "s")
    assert [index.known(path, learned[path].state) for path in paths] == [(path.stem,) for path in paths]


def test_files_that_are_gone_and_what_only_they_held_leave_the_index(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "e")
    paths = [layout.residual("s", number) for number in range(3)]
    for path in paths:
        write_bytes(path, b"x")
        state = FileState.of(path.stat())
        remember(layout, {path: Learned(state, (b'"shared"', orjson.dumps(path.stem)))})
    paths[1].unlink()
    remember(layout, {paths[0]: Learned(FileState.of(paths[0].stat()), (b'"shared"', b'"0"'))})
    content = json.loads((layout.folder / ".locks" / "files-of-s.index").read_bytes().partition(b"\n")[2])
    assert sorted(content["parts"]) == ["0", "2", "shared"]
    assert sorted(content["folders"]["inference/raw/residual/s"]) == ["0.pt", "2.pt"]


def test_the_set_of_a_file_is_told_by_its_place(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "e")
    assert capture_set_of(layout, layout.residual("a/raw", 1)) == "a/raw"
    assert capture_set_of(layout, layout.internals("a@v", 1, 2)) == "a@v"
    assert capture_set_of(layout, layout.attention("a", 1)) == "a"
    assert capture_set_of(layout, layout.shards("residual", "a/b") / "1.safetensors") == "a/b"
    assert capture_set_of(layout, layout.shards("attn_out", "a/b") / "+" / "1.safetensors") == "a/b"
    assert capture_set_of(layout, layout.folder / "inference/tone/x/attn_stream/a/b/1.json") == "a/b"
    for other in (layout.config, layout.folder / "analysis/compare/b/s/1.json", tmp_path / "x", layout.run_record("r")):
        assert capture_set_of(layout, other) is None


@pytest.mark.parametrize("form", ["json", "compact", "samples"])
def test_the_summary_of_the_last_run_is_shown_until_a_projection_changes(
    make: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def table(result: Result) -> str:
        return result.stdout.partition("short: the trait")[2].partition("wrote ")[0]

    make(*FORMS[form])
    read: list[str] = []

    def counted(*args: Any) -> Any:
        read.append("read")
        return summary_of(*args)

    monkeypatch.setattr(saved_summaries.top_traits, "summary_of", counted)
    shown = [table(make(*FORMS[form], "--skip-existing"))]
    assert read == []
    for path in (folder / ".locks").glob("summary-of-*"):
        path.unlink()
    shown.append(table(make(*FORMS[form], "--skip-existing")))
    assert shown[0] == shown[1] != ""
    projections = [*folder.glob("inference/tone/*/*/short/*.json"), *folder.glob("analysis/projections/*/short/+/*")]
    os.utime(projections[0])
    make(*FORMS[form], "--skip-existing")
    assert read == ["read", "read"]


def test_files_of_other_prompts_are_not_taken_for_finished_ones(make: Run, capture: Run, folder: Path) -> None:
    make("--attention", "--logit-lens")
    moved = {
        "1": ("analysis/per_token/short/{}_attention.json", "it names prompt short/2"),
        "2": ("analysis/per_token/short/{}_logit_lens.json", "it names prompt short/3"),
        "3": ("inference/tone/loud/residual_stream/short/{}.json", "its metadata names prompt 1"),
    }
    expected = {}
    for prompt, (place, says) in moved.items():
        path = folder / place.format(prompt)
        path.write_bytes((folder / place.format(says[-1])).read_bytes())
        expected[path] = f"failed: short/{prompt}: {path}: {says}: it was moved or renamed: use --overwrite"
    before = {path: path.read_bytes() for path in expected}
    result = capture("--attention", "--logit-lens", "--skip-existing")
    assert result.exit_code == 1
    for line in expected.values():
        assert line in result.stderr
    assert {path: path.read_bytes() for path in expected} == before


def test_a_lens_of_the_whole_vocabulary_lacks_no_predictions(
    make: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("--logit-lens", "--lens-top", 5000, "--limit", 1)
    make(*wanted)
    before = states(folder)
    monkeypatch.setattr("tlcapture.runs.model_loader.ModelLoader.__call__", lambda load: pytest.fail("it was loaded"))
    for replay in ((), ("--replay",)):
        assert "wrote 0 files" in make(*wanted, *replay, "--skip-existing").stdout
        assert states(folder) == before
