"""What many prompts cost: the number of calls grows with the number of prompts, and not with its square."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tlcapture import Experiment
from tlcapture.commands.capturing.adhoc_prompts import numbered_on
from tlcapture.commands.capturing.tasks import CaptureTask
from tlcapture.generation.loop import _Queue
from tlcapture.generation.samples import n_together, sampled
from tlcapture.page.contents import Contents
from tlcapture.prompts.prompt_sets import ADHOC, PromptSet
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.background_writer import BackgroundWriter
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.file_index import as_facts
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FSYNC, fsyncing, write_bytes
from tlcapture.storage.temporary_files import temporary_path

FEW, MANY = 100, 400
TRAITS = 4


def n_calls(work: Callable[[], Any]) -> int:
    """How many functions are called, those of C included."""
    found = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def is_linear(work: Callable[[int], Callable[[], Any]]) -> bool:
    """Whether work on four times as many prompts takes at most 4.8 times the calls, less those of one prompt."""
    _, start, few, many = (n_calls(work(count)) for count in (1, 1, FEW, MANY))
    return (many - start) / (MANY - 1) <= 1.2 * (few - start) / (FEW - 1)


@pytest.fixture
def layout_of(tmp_path: Path) -> Callable[[int], Layout]:
    """An experiment with captures `1.s1`, `1.s2`, `2.s1` ... and the beginnings of their projections."""

    def make(count: int) -> Layout:
        layout = Layout(tmp_path / str(count), "e")
        for number in range(count):
            name = f"{number // 2}.s{number % 2 + 1}"
            paths = [layout.residual("s", name), layout.attention("s", name)]
            for trait in range(TRAITS):
                folder = layout.folder / "inference" / "tone" / f"t{trait}" / "residual_stream" / "s"
                paths.append(folder / f"{name}.json")
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"prompt": {"text": f"text of {name}"}}))
        return layout

    return make


def test_batches_begin_anywhere_as_they_would_at_the_beginning() -> None:
    prompts = [each for number in range(5) for each in sampled([_prompt(number)], 3)] + [_prompt(9)]
    for start in range(len(prompts) + 1):
        for most in (1, 2, 3, 4, 7, 100):
            assert n_together(prompts, most, start) == n_together(prompts[start:], most)


def test_batches_do_not_copy_what_is_left() -> None:
    copied = 0

    class Counting(list):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            nonlocal copied
            found = super().__getitem__(key)
            copied += len(found) if isinstance(key, slice) else 1
            return found

    prompts = [_prompt(number) for number in range(MANY)]
    queue = _Queue(prompts, 2)
    queue._prompts = Counting(queue._prompts)
    taken = [each for _ in iter(lambda: bool(queue), False) for each in queue.next_batch()]
    assert taken == prompts
    assert copied <= 4 * MANY
    task = CaptureTask(
        PromptSet.model_construct(name="s", prompts=[]), prompts, frozenset(each.name for each in prompts)
    )
    assert [each.name for part in task.split(3) for each in part.batched] == [each.name for each in prompts]


def test_jobs_that_wait_are_not_counted_again_for_each_job(tmp_path: Path) -> None:
    def work(count: int) -> Callable[[], None]:
        def submit() -> None:
            go = Event()
            with BackgroundWriter(Run.silent(Layout(tmp_path, "e")), n_writers=1, most_bytes=10**9) as writer:
                for _ in range(count):
                    writer.submit(lambda run: go.wait(), 10)
                go.set()

        return submit

    assert is_linear(work)


def test_captures_of_a_set_are_found_in_linear_time(
    layout_of: Callable[[int], Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(experiment: Any, prompt_set: str, name: str) -> Any:
        return SimpleNamespace(name=name, sample=int(name[-1]))

    monkeypatch.setattr("tlcapture.explore.captured_sets.SavedCapture", opened)

    def work(count: int) -> Callable[[], None]:
        captures = Experiment("e", layout_of(count).root).captures("s")

        def use() -> None:
            assert len(captures.values()) == len(captures.items()) == count
            for position in range(count):
                captures.at(position)
                captures.samples(position // 2)

        return use

    assert is_linear(work)
    assert [each.name for each in Experiment("e", layout_of(FEW).root).captures("s").samples(3)] == ["3.s1", "3.s2"]


@pytest.mark.parametrize("form", ["json", "none"])
def test_the_page_lists_a_set_in_linear_time_and_few_calls(layout_of: Callable[[int], Layout], form: str) -> None:
    def work(count: int) -> Callable[[], None]:
        layout = layout_of(count)
        if form == "none":
            for path in layout.folder.glob("inference/tone/*/*/*/*.json"):
                path.unlink()
        return lambda: listed.append(Contents(layout.root).prompt_set("e", "s"))

    listed: list[dict[str, Any]] = []
    assert is_linear(work)
    texts = {"1.s2": "text of 1.s2" if form == "json" else ""}
    found = next(each for each in listed[-1]["prompts"] if each["id"] == "1.s2")
    assert found == {
        "id": "1.s2", "prompt": "1", "sample": 2, "text": texts["1.s2"], "attention": True, "logit_lens": False,
    }  # fmt: skip
    assert listed[-1]["traits"] == ([f"tone/t{trait}" for trait in range(TRAITS)] if form == "json" else [])


def test_the_names_of_a_set_take_a_few_calls_each(layout_of: Callable[[int], Layout]) -> None:
    layout = layout_of(MANY)
    assert n_calls(lambda: layout.prompt_ids("s")) < MANY * (12 + 8 * TRAITS)
    assert layout.prompt_ids("s")[:3] == ["0.s1", "0.s2", "1.s1"]


def test_prompts_of_the_command_line_are_numbered_from_files_read_once(
    layout_of: Callable[[int], Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def open_capture(path: Path) -> Any:
        opened.append(path)
        return SimpleNamespace(metadata={"prompt_id": path.stem.split(".")[0], "prompt_text": path.read_text()})

    monkeypatch.setattr("tlcapture.commands.capturing.adhoc_prompts.Capture.open", open_capture)
    layout = layout_of(4)
    folder = layout.residual("s", 1).parent
    folder.rename(folder.with_name(ADHOC))
    changed = layout.residual(ADHOC, "0.s1")
    given = PromptSet(name=ADHOC, prompts=[{"id": 1, "text": "new"}, {"id": 2, "text": "changed"}])
    assert [prompt.id for _ in range(3) for prompt in numbered_on(layout, given).prompts] == ["2", "3"] * 3
    assert len(opened) == 4
    changed.write_text("changed")
    assert [prompt.id for prompt in numbered_on(layout, given).prompts] == ["2", "0"]
    assert opened[4:] == [changed]


def test_a_run_looks_for_leftovers_in_the_folders_of_its_own_sets(layout_of: Callable[[int], Layout]) -> None:
    layout = layout_of(2)
    (layout.folder / "runs").mkdir()
    (layout.folder / "analysis" / "compare" / "other" / "s").mkdir(parents=True)
    other = layout.folder / "inference" / "raw" / "residual" / "s" / "below"
    other.mkdir()
    folders = set(layout.written_folders(["s"]))
    assert {path.parent for path in layout.folder.rglob("*.*") if path.parent != layout.folder} <= folders
    assert {layout.folder / "runs", layout.folder / "analysis" / "compare" / "other" / "s"} <= folders
    assert other not in folders
    assert layout.residual("s", 1).parent not in set(layout.written_folders(["t"]))


def test_what_is_kept_of_many_files_takes_the_memory_of_its_text() -> None:
    memory = psutil.Process().memory_info
    before = memory().rss
    kept = [as_facts([number, "x"]) for number in range(5000)]
    assert None not in kept
    assert memory().rss - before < 5 * 2**20  # orjson's own results would take 20 MB


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of what is synchronised, and of what is renamed, in their order."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record(descriptor: int) -> None:
        found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(path: Path, target: Path) -> None:
        found.append(f"-> {target}")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    return found


def test_fsync_has_the_file_on_the_disk_before_its_name_and_then_the_folders(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "a" / "b" / "x.bin"
    write_bytes(path, b"1")
    assert synced == [f"-> {path}"]
    synced.clear()
    path = tmp_path / "c" / "d" / "x.bin"
    with fsyncing():
        write_bytes(path, b"1")
    temporary = temporary_path(path).name.split(".")[:3]
    assert [synced[0], synced[1]] == [str(tmp_path / "c"), str(tmp_path)]
    assert Path(synced[2]).parent == path.parent and Path(synced[2]).name.split(".")[:3] == temporary
    assert synced[3:] == [f"-> {path}", str(path.parent)]
    assert FSYNC not in os.environ


def _prompt(number: int) -> TokenizedPrompt:
    return TokenizedPrompt("s", number, "a", "a", (5, number), None, False)
