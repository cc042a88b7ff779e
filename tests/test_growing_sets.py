"""What a set costs that grows: looking for a prompt's files takes as many calls in a large set as in a small one."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from tests.page.conftest import projection
from tlcapture import Experiment
from tlcapture.captures.notes import Marked, add_note
from tlcapture.commands.project import ProjectOptions, _recompute_dynamics
from tlcapture.commands.prompt_files import projection_writing
from tlcapture.commands.prompt_files.projection_writing import ProjectionFiles
from tlcapture.explore.figures.set_means import SetLine, mean_of
from tlcapture.names import Trait
from tlcapture.page import prompt_list
from tlcapture.page.average import average_trajectory
from tlcapture.page.contents import Contents
from tlcapture.page.export import export_page
from tlcapture.runs import received_files
from tlcapture.runs.display import Display
from tlcapture.runs.report import Done, RunReport
from tlcapture.runs.run import Run
from tlcapture.storage import folders, json_text
from tlcapture.storage.compact import projection_shards, shard_writing
from tlcapture.storage.experiments.file_index import Learned
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState, read_json, write_json
from tlcapture.traits.projections.saved import SavedProjection
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.selection import select
from tlcapture.traits.vector_files import VectorFiles

LONG_AGO = 10**18  # nanoseconds since the epoch


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that folders were read for, in their order."""
    found: list[str] = []
    scandir = os.scandir

    class Counted:
        def __init__(self, path: Any) -> None:
            self._entries = scandir(path)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return (found.append(each.name) or each for each in self._entries)  # type: ignore[func-returns-value]

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    monkeypatch.setattr(folders, "scandir", Counted)
    monkeypatch.setattr(folders, "_AGAIN", 1e9)  # so that no half a minute ends while names are counted
    return found


@pytest.fixture
def internals(tmp_path: Path) -> Callable[[int], Layout]:
    """An experiment with captures of a set and internals of two layers each, made long ago."""

    def make(count: int) -> Layout:
        layout = Layout(tmp_path / str(count), "e")
        for number in range(count):
            for path in (
                layout.residual("s", number),
                layout.internals("s", number, 0),
                layout.internals("s", number, 12),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        os.utime(layout.internals("s", 0, 0).parent, ns=(LONG_AGO, LONG_AGO))
        return layout

    return make


def test_the_internals_of_each_prompt_are_found_in_one_listing(
    internals: Callable[[int], Layout], listed: list[str]
) -> None:
    layout = internals(50)
    listed.clear()
    for number in range(50):
        found = layout.all_internals("s", number)
        assert found == [layout.internals("s", number, layer) for layer in (0, 12)]
    assert len(listed) <= 2 * 50
    assert layout.all_internals("s", 5) == [layout.internals("s", 5, layer) for layer in (0, 12)]
    layout.internals("s", 5, 3).touch()  # by another run, which changes the folder's time
    assert [path.name for path in layout.all_internals("s", 5)] == ["5_L0.pt", "5_L12.pt", "5_L3.pt"]


def test_a_run_that_writes_internals_lists_them_once(internals: Callable[[int], Layout], listed: list[str]) -> None:
    count = 50
    layout = Run(internals(count), RunReport(Path()), Display()).layout
    listed.clear()
    for number in range(count):
        assert len(layout.all_internals("s", number)) == 2
        layout.internals("s", number, 7).touch()  # which changes the folder's time
        assert [path.name for path in layout.all_internals("s", number)] == [f"{number}_L{n}.pt" for n in (0, 12, 7)]
    assert len(listed) == 2 * count


def test_whether_a_set_has_captures_is_seen_at_the_first(internals: Callable[[int], Layout], listed: list[str]) -> None:
    layout = internals(50)
    listed.clear()
    assert layout.has_captures("s") and not layout.has_captures("t")
    assert len(listed) == 1
    assert layout.captured_prompt_sets() == ["s"]
    hidden = layout.residual("u", 1).with_name(".hidden.pt")
    hidden.parent.mkdir()
    hidden.touch()
    assert not layout.has_captures("u") and layout.captured_prompt_sets() == ["s"]


def _contents(number: int, *traits: str) -> dict[str, Any]:
    content = projection(number)
    content["metadata"] |= {"layers": [0, 1, 2], "prompt_id": str(number)}
    return dict.fromkeys(traits, content)


def test_a_prompt_is_looked_for_in_few_shards_however_many_runs_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writing, "_MOST_SMALL", 3)
    layout = Layout(tmp_path, "e")
    folder = layout.shards("residual", "odd")
    for run in range(12):
        for number in (2 * run, 2 * run + 1):
            shard_writing.write_prompt(folder, str(number), _contents(number, "style/odd"), now=run)
        shard_writing.merge_shards(folder)
    shard_writing.write_prompt(folder, "3", _contents(103, "style/odd", "style/even"), now=99)
    assert len(projection_shards.merged_shards(folder)) <= 4
    for number in range(24):
        found = projection_shards.sharded_of(folder, str(number))
        assert sorted(found) == (["style/even", "style/odd"] if number == 3 else ["style/odd"])
        written = 99 if number == 3 else number // 2
        assert {each.written_ns for each in found.values()} == {written}
        expected = _contents(103 if number == 3 else number, "style/odd")["style/odd"]["projections"]
        assert found["style/odd"].content()["projections"] == expected
    assert layout.has_prompt("odd", 3) and layout.has_prompt("odd", "7") and not layout.has_prompt("odd", 24)
    before = projection_shards.merged_shards(folder)
    monkeypatch.setattr(shard_writing, "_MOST_SMALL", 0)
    projection_shards.shard_of_prompt(folder, "3").unlink()
    assert shard_writing.merge_shards(folder) == []  # nothing is new
    assert projection_shards.merged_shards(folder) == before


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The size of the largest array that was made so far."""
    largest = 0
    zeros = np.zeros

    def counted(shape: Any, *how: Any, **more: Any) -> Any:
        nonlocal largest
        made = zeros(shape, *how, **more)
        largest = max(largest, made.size)
        return made

    monkeypatch.setattr(np, "zeros", counted)
    monkeypatch.setattr(np, "full", lambda shape, *how, **more: counted(shape))
    return lambda: largest


def test_a_mean_takes_no_more_memory_for_one_long_capture_among_many(largest: Callable[[], int]) -> None:
    found = average_trajectory([([9.0, 1.0], [2.0, 4.0])] * 100 + [([9.0, 1.0], [2.0] * 500)])
    assert largest() == 502
    assert found["mean"][:3] == [1.0, 2.0, pytest.approx(402 / 101)]
    assert (found["n"][2:4], found["sd"][3]) == ([101, 1], None)


def test_nor_does_the_mean_that_a_figure_draws(largest: Callable[[], int]) -> None:
    lines = [SetLine("style/odd", 2, np.array([9.0, 1.0, *response]), None) for response in [[2.0, 4.0]] * 100]
    lines.append(SetLine("style/odd", 2, np.array([9.0, 1.0, *[2.0] * 500]), None))
    found = mean_of(lines, lambda line: line.trajectory)
    assert largest() == 502
    assert found.mean[1:4].tolist() == [1.0, 2.0, pytest.approx(402 / 101)]
    assert (found.n[2:5].tolist(), np.isnan(found.spread[[0, 4]]).tolist()) == ([101, 101, 1], [True, True])


def test_a_frame_or_a_figure_of_a_set_holds_the_scores_of_one_projection(
    of_samples: Callable[[int], Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = of_samples(4)
    alive: list[weakref.ref[TokenScores]] = []
    most = 0
    read = SavedProjection.scores

    def counted(saved: SavedProjection) -> TokenScores:
        nonlocal most
        found = read(saved)
        alive.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(SavedProjection, "scores", counted)
    captures = Experiment("exp", layout.root).captures("odd")
    frame = captures.to_pandas("style/odd")
    assert len(frame) == 8 * 6 and set(frame["sample"]) == {1, 2}
    figure = captures.plot.trajectory("style/odd")
    assert figure.data[1].customdata.tolist() == [8] * 5
    assert (len(alive), most) == (16, 2)  # the last one and this one


def test_a_note_looks_for_its_prompt_alone(
    internals: Callable[[int], Layout], listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = internals(50)
    monkeypatch.setattr(Contents, "tokens", lambda *where: ["a", "b"])
    listed.clear()
    Contents(layout.root).add_note("e", "s", "7", {"start": 0, "stop": 1, "text": "here"})
    assert len(listed) < 20


def test_equal_facts_about_many_files_are_kept_once(tmp_path: Path) -> None:
    report = RunReport(tmp_path)
    for number in range(3):
        shared = bytes([1, 2, 3] * 10)
        report.learn(tmp_path / f"{number}", Learned(FileState(1, 2, 3), (shared, b"%d" % number)))
    facts = [each.facts for each in report.learned.values()]
    assert facts[2] == (bytes([1, 2, 3] * 10), b"2")
    assert len({id(shared) for shared, _ in facts}) == 1


@pytest.fixture
def of_samples(tmp_path: Path) -> Callable[[int], Layout]:
    """An experiment with two samples of each prompt, projected onto two traits, written long ago."""

    def make(count: int) -> Layout:
        layout = Layout(tmp_path / str(count), "exp")
        for number in range(2 * count):
            name = f"{number // 2}.s{number % 2 + 1}"
            for trait in ("style/odd", "style/even"):
                path = layout.projection(Trait.parse(trait), "residual", "odd", name)
                content = projection(1)
                content["metadata"] |= {"prompt_id": str(number // 2), "sample": number % 2 + 1}
                write_json(path, content)
        _made_long_ago(layout.folder)
        return layout

    return make


def _made_long_ago(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            os.utime(path, ns=(LONG_AGO, LONG_AGO))


def test_an_export_lists_a_set_with_samples_a_few_times(of_samples: Callable[[int], Layout], listed: list[str]) -> None:
    def names_listed(count: int) -> int:
        layout = of_samples(count)
        listed.clear()
        export_page(layout.root, "exp", ["odd"], layout.root / "page.html")
        return len(listed)

    few, more, many = map(names_listed, (2, 4, 8))
    assert many - more <= 2.2 * (more - few)


def test_an_open_page_reads_what_it_has_listed_again_when_it_changes(
    of_samples: Callable[[int], Layout], listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    head = prompt_list._head
    monkeypatch.setattr(prompt_list, "_head", lambda layout, path: read.append(path) or head(layout, path))
    layout = of_samples(20)
    contents = Contents(layout.root)
    before = contents.prompt_set("exp", "odd")
    assert len(read) == 40
    listed.clear()
    assert contents.prompt_set("exp", "odd") == before
    assert len(read) == 40 and len(listed) < 60
    add_note(layout, "odd", "3.s1", Marked(0, 1, ["<bos>"]), "here")
    assert contents.prompt_set("exp", "odd") != before
    path = layout.projection(Trait.parse("style/even"), "residual", "odd", "3.s2")
    write_json(path, {**read_json(path), "prompt": {"text": "another", "tokens": ["<bos>", "x"]}})
    path.with_name("99.json").write_bytes(path.read_bytes())
    assert contents.prompt_set("exp", "odd")["prompts"][-1]["id"] == "99"


def test_the_samples_of_a_prompt_are_found_without_listing_the_set_each_time(
    of_samples: Callable[[int], Layout], listed: list[str]
) -> None:
    def names_listed(count: int) -> int:
        layout = of_samples(count)
        contents = Contents(layout.root)
        first = contents.samples("exp", "odd", "0", "style", "odd", "residual")
        assert first["n_captures"] == 2
        listed.clear()
        for number in range(count):
            contents.samples("exp", "odd", str(number), "style", "odd", "residual")
        return len(listed)

    few, many = names_listed(4), names_listed(8)
    assert many == 2 * few  # as many for each prompt
    layout = of_samples(8)
    path = layout.projection(Trait.parse("style/odd"), "residual", "odd", "7.s2")
    content = read_json(path)
    content["metadata"]["sample"] = 3
    write_json(path.with_name("7.s3.json"), content)
    assert Contents(layout.root).samples("exp", "odd", "7", "style", "odd", "residual")["n_captures"] == 3


def test_what_the_page_gets_of_a_trait_does_not_grow_with_the_other_traits(tmp_path: Path) -> None:
    def size(count: int) -> int:
        layout = Layout(tmp_path / str(count), "exp")
        traits = [f"style/t{number}" for number in range(count)]
        each = dict.fromkeys(traits, 0.5)
        rows = [
            {"trait": trait, "method": "probe", "layer": 1, "val_effect_size": 2.0, "val_auroc": 0.5}
            | {"cosine_to_traits": each}
            for trait in traits
        ]
        write_json(layout.evaluation, {"all_results": rows, "cross_trait": dict.fromkeys(traits, each)})
        layout.vectors(Trait.parse(traits[0])).mkdir(parents=True)
        (layout.vectors(Trait.parse(traits[0])) / "probe_layer1.pt").touch()
        contents = Contents(layout.root)
        assert len(contents.cross_traits("exp", "exp")["aurocs"][0]) == count
        return len(orjson.dumps(contents.vectors("exp", "style", "t0")))

    assert size(10) == size(30)


def test_a_repeated_key_is_found_without_comparing_each_with_all() -> None:
    compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    with pytest.raises(ValueError, match="the key 'k99' occurs twice"):
        json_text._without_repetition([(Key(f"k{number}"), 0) for number in (*range(100), 99)])
    assert compared < 20


def test_each_set_and_each_capture_is_opened_without_listing_the_others(
    internals: Callable[[int], Layout], listed: list[str]
) -> None:
    layout = internals(50)
    for number in range(20):
        path = layout.residual(f"t{number}", 1)
        path.parent.mkdir()
        path.touch()
    captures = Experiment("e", layout.root).captures
    listed.clear()
    for name in [f"t{number}" for number in range(20)]:
        assert len(captures[name]) == 1
    for number in range(50):
        assert captures["s"][number].prompt_set == "s"
    assert len(listed) == 20 * 2 + 50  # one name of each set, and then all of the small ones
    with pytest.raises(KeyError, match="50: prompt set"):
        captures["s"][50]
    for name in ("u", 3, "../s"):
        with pytest.raises(KeyError):
            captures[name]  # type: ignore[index]


def test_an_evaluation_is_read_once_for_all_traits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path, "e")
    traits = [Trait("style", f"t{number}") for number in range(12)]
    rows = [{"trait": str(trait), "method": "probe", "layer": 1, "val_effect_size": 2.0} for trait in traits]
    write_json(layout.evaluation, {"all_results": rows})
    for trait in traits:
        layout.vectors(trait).mkdir(parents=True)
        (layout.vectors(trait) / "probe_layer1.pt").touch()
    checked: list[str] = []
    parse = Trait.parse
    monkeypatch.setattr(Trait, "parse", staticmethod(lambda name: checked.append(name) or parse(name)))
    found = [select(VectorFiles(layout, trait), "residual", 3) for trait in traits]
    assert {(each.layer, each.selected_by) for each in found} == {(1, "effect_size")}
    assert len(checked) == len(traits)
    write_json(layout.evaluation, {"all_results": [{**row, "val_effect_size": 3.0} for row in rows]})
    assert select(VectorFiles(layout, traits[0]), "residual", 3).score == 3.0


def test_the_shard_of_a_prompt_is_rewritten_once_for_all_its_traits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path, "e")
    traits = [f"style/t{number}" for number in range(5)]
    folder, contents = layout.shards("residual", "odd"), _contents(1, *traits)
    shard_writing.write_prompt(folder, "1", contents, now=1)
    calls: list[str] = []
    for module, name in ((shard_writing, "write_prompt"), (projection_writing, "take_out")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *how, name=name, real=real: calls.append(name) or real(*how))
    run = Run.silent(layout)
    _recompute_dynamics(run, "odd", ["1"], ProjectOptions(dynamics_only=True))
    assert (calls, run.report.n_files, run.report.failures) == (["write_prompt"], 1, [])
    found = projection_shards.sharded_of(folder, "1")
    assert sorted(found) == traits and all(each.written_ns > 1 for each in found.values())
    assert found[traits[0]].content()["projections"] == contents[traits[0]]["projections"]
    files = ProjectionFiles(run, "odd", "1", "json")
    for trait in traits[1:]:
        vector: Any = SimpleNamespace(component="residual", trait=Trait.parse(trait))
        files.add(layout.projection(vector.trait, "residual", "odd", "1"), vector, contents[trait])
    files.write()
    assert calls == ["write_prompt", "take_out"]
    assert list(projection_shards.sharded_of(folder, "1")) == traits[:1]
    assert len(layout.all_projections("odd", "1")) == 4
    sent = {str(path.relative_to(layout.root)): path.read_bytes() for path in layout.all_projections("odd", "1")}
    shard_writing.write_prompt(folder, "1", contents, 2)
    calls.clear()
    monkeypatch.setattr(
        received_files, "take_out", lambda *how: calls.append("take_out") or shard_writing.take_out(*how)
    )
    received_files.store_outputs(layout, sent, Done())  # of a worker on another machine
    assert calls == ["take_out"] and list(projection_shards.sharded_of(folder, "1")) == traits[:1]
