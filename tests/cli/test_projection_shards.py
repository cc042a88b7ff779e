"""Projections in the compact form: shards of all traits and several prompts, read as JSON files are."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors import safe_open
from safetensors.numpy import load_file

from tests import tiny
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.exchange.exported import ChosenActivations, read_exported
from tlcapture.explore.experiment import Experiment
from tlcapture.page.contents import Contents
from tlcapture.storage.compact import shard_writing
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.projections.saved import all_saved, projections_of_prompt

Run = Callable[..., Result]
GREEDY = ("--temperature", 0)


@pytest.fixture
def shards(data: Path) -> Path:
    return data / "experiments" / "exp" / "analysis" / "projections" / "residual_stream" / "short"


@pytest.fixture
def json_files(data: Path) -> Callable[[], dict[str, Any]]:
    """The contents of all projection files in JSON, without their dates."""

    def found() -> dict[str, Any]:
        folder = data / "experiments" / "exp" / "inference"
        return {
            path.relative_to(folder).as_posix(): undated(read_json(path))
            for path in sorted(folder.rglob("*_stream/short/*.json"))
        }

    return found


def undated(content: dict[str, Any]) -> dict[str, Any]:
    metadata = {k: v for k, v in content["metadata"].items() if k not in ("projection_date", "capture")}
    return {**content, "metadata": metadata}


def saved(data: Path) -> dict[str, Any]:
    """The contents of all projections, whatever form they are in."""
    layout = Layout(data, "exp")
    return {
        each.json_path.relative_to(layout.folder / "inference").as_posix(): undated(each.content())
        for prompt_id in layout.prompt_ids("short")
        for each in all_saved(layout, "short", prompt_id)
    }


def assert_close(contents: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same scores but for rounding, which depends on the vectors that are projected together."""
    assert contents.keys() == expected.keys()
    for name, each in contents.items():
        for part in ("prompt", "response"):
            found, wanted = (np.array(content["projections"][part]) for content in (each, expected[name]))
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--layers", "0,2", "--layer", 2),
        ("--points", "residual_out"),
        ("--tokens", "1:4"),
        ("--tokens", "20:30"),
        ("--capture-attn",),
    ],
)
@pytest.mark.parametrize("only", [(), ("--projections-only",)])
def test_a_shard_holds_what_the_json_files_do(
    extract: Run, capture: Run, data: Path, shards: Path, json_files: Any, words: tuple[Any, ...], only: tuple[Any, ...]
) -> None:
    extract()
    assert capture(*GREEDY, *words, *only, "--format", "json").exit_code == 0
    expected = json_files()
    assert len(expected) == 6 * (2 if "--capture-attn" in words else 1)
    done = capture(*GREEDY, *words, *only, "--format", "compact")
    assert done.exit_code == 0, done.output
    assert not json_files()
    assert saved(data) == expected
    assert [path.relative_to(shards).as_posix() for path in shards.rglob("*.safetensors")] == ["+/1.safetensors"]


def test_scores_lie_by_token_trait_layer_and_point(extract: Run, capture: Run, shards: Path, json_files: Any) -> None:
    extract()
    capture(*GREEDY)
    expected = json_files()
    capture(*GREEDY, "--format", "compact")
    path = shards / "+" / "1.safetensors"
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        index = json.loads(file.metadata()["content"])
    assert index["traits"] == ["tone/loud", "tone/warm"]
    assert index["layers"] == list(range(tiny.N_LAYERS))
    for entry in index["prompts"]:
        rows = slice(*entry["rows"])
        for column, trait in enumerate(index["traits"]):
            content = expected[f"{trait}/residual_stream/short/{entry['id']}.json"]
            scores = [*content["projections"]["prompt"], *content["projections"]["response"]]
            assert np.array_equal(tensors["scores"][rows, column], np.array(scores, np.float32))
            velocity = np.array(content["dynamics"]["velocity"], np.float32)
            assert np.array_equal(tensors["velocity"][rows, column][:-1], velocity)


def test_page_frames_and_summary_are_those_of_json(extract: Run, capture: Run, data: Path) -> None:
    extract()
    seen = []
    for form in ("json", "compact"):
        capture(*GREEDY, "--format", form)
        contents, experiment = Contents(data), Experiment("exp", data)
        prompts = [contents.prompt("exp", "short", name) for name in ("1", "2", "3")]
        layers = [contents.layers("exp", "short", name, "tone", "loud", "residual") for name in ("1", "2", "3")]
        seen.append(
            (
                contents.experiments(),
                contents.prompt_set("exp", "short"),
                prompts,
                layers,
                contents.average("exp", "short", "tone", "warm", "residual"),
                experiment.to_pandas("short").to_dict(),
                summary_of(Layout(data, "exp"), "short"),
            )
        )
    assert seen[0] == seen[1]
    assert seen[0][2][0]["projections"], "nothing was compared"


def test_an_export_does_not_depend_on_the_form(extract: Run, capture: Run, data: Path) -> None:
    extract()
    seen = []
    for form in ("json", "compact"):
        capture(*GREEDY, "--format", form)
        exported = [read_exported(Layout(data, "exp"), "short", name, ChosenActivations()) for name in ("1", "2", "3")]
        for each in exported:
            for projection in each.record["projections"]:
                del projection["content"]["metadata"]["projection_date"]
            each.record.get("metadata", {}).pop("capture_date", None)
        seen.append([(each.record["projections"], each.columns) for each in exported])
    assert seen[0] == seen[1]
    assert len(seen[0][0][0]) == 2


def test_dynamics_only_and_project_work_on_shards(
    extract: Run, capture: Run, tlcapture: Run, data: Path, shards: Path, json_files: Any
) -> None:
    extract()
    common, after = ("project", "--experiment", "exp", "--prompt-set", "short"), []
    for form in ("json", "compact"):
        capture(*GREEDY, "--format", form)
        before = saved(data)
        assert tlcapture(*common, "--dynamics-only").exit_code == 0
        after.append(saved(data))
    assert after[0] == after[1]
    assert not json_files()
    assert [path.name for path in (shards / "+").iterdir()] == ["2.safetensors"], "what replaces a shard removes it"
    assert tlcapture(*common, "--format", "compact").exit_code == 0
    assert tlcapture(*common, "--traits", "tone/loud", "--format", "json").exit_code == 0
    assert len(json_files()) == 3
    assert_close(saved(data), before)
    assert tlcapture(*common, "--traits", "tone/warm", "--layer", 1, "--format", "compact").exit_code == 0
    assert_close(saved(data), before)
    files = {path: path.stat().st_mtime_ns for path in shards.rglob("*.safetensors")}
    assert tlcapture(*common, "--format", "compact", "--skip-existing").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.safetensors")} == files
    drawn = tlcapture(*common, "--format", "compact", "--plot", data / "pictures")
    assert drawn.exit_code == 0
    pictures = data / "pictures"
    drawn_of = {
        (path.relative_to(pictures).parent / f"{path.stem.rpartition('_')[2]}.json").as_posix()
        for path in pictures.rglob("*.png")
    }
    assert drawn_of == before.keys()


def test_projections_of_a_variant_lie_beside_those_of_its_set(
    extract: Run, capture: Run, tlcapture: Run, data: Path, shards: Path
) -> None:
    extract()
    for form in ("json", "compact"):
        assert capture(*GREEDY, "--format", form).exit_code == 0
    before = {path: path.read_bytes() for path in shards.rglob("*.safetensors")}
    steered = ("--steer", "tone/loud:+0.5@1", "--variant", "v")
    layout, contents = Layout(data, "exp"), []
    for form in ("json", "compact"):
        assert capture(*GREEDY, *steered, "--format", form).exit_code == 0
        found = [each.scores() for each in projections_of_prompt(layout, "short@v", "1", "residual")]
        contents.append([(each.trait, each.prompt_set, each.scores.tolist()) for each in found])
    assert contents[0] == contents[1]
    assert [name for _, name, _ in contents[1]] == ["short@v"] * 2
    assert len(list((shards.parent / "short@v").rglob("*.safetensors"))) == 1
    assert {path: path.read_bytes() for path in shards.rglob("*.safetensors")} == before
    assert tlcapture("project", "--experiment", "exp", "--prompt-set", "short@v", "--dynamics-only").exit_code == 0


def test_a_prompt_that_is_captured_again_leaves_nothing_in_a_shard(
    extract: Run, capture: Run, data: Path, shards: Path
) -> None:
    """Its tokens change, and it is not projected: those of the other prompts stay as they were."""
    extract()
    capture(*GREEDY, "--format", "compact")
    before = saved(data)
    assert capture("--temperature", 5, "--seed", 3, "--limit", 1, "--no-project").exit_code == 0
    assert saved(data) == {name: content for name, content in before.items() if not name.endswith("/1.json")}
    assert sorted(path.name for path in shards.rglob("*.safetensors")) == ["2.safetensors", "3.safetensors"]
    capture(*GREEDY, "--format", "compact", "--skip-existing")
    assert saved(data).keys() == before.keys()


def test_a_damaged_shard_is_named_and_kept_unless_told(
    extract: Run, capture: Run, tlcapture: Run, data: Path, shards: Path
) -> None:
    extract()
    capture(*GREEDY, "--format", "compact")
    path, common = shards / "+" / "1.safetensors", ("project", "--experiment", "exp", "--prompt-set", "short")
    before, whole = saved(data), path.read_bytes()
    for damaged in (whole[:-4], whole[:100], b"", whole.replace(b'\\"rows\\":[0,', b'\\"rows\\":[9,')):
        path.write_bytes(damaged)
        for words in ((), ("--format", "compact"), ("--dynamics-only",), ("--skip-existing",)):
            refused = tlcapture(*common, *words)
            assert refused.exit_code == 1, (words, refused.output)
            assert str(path) in refused.stderr
            assert "Traceback" not in refused.output
        assert path.read_bytes() == damaged
        problems = Contents(data).prompt("exp", "short", "1")["problems"]
        assert len(problems) == 1
        assert "+/1.safetensors" in problems[0]
    assert tlcapture(*common, "--overwrite", "--format", "compact").exit_code == 0
    assert saved(data) == before


def test_a_run_that_ends_between_shard_and_removal_loses_nothing_and_leaves_nothing_twice(
    extract: Run, capture: Run, data: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract()
    with monkeypatch.context() as patch:
        patch.setattr(shard_writing, "remove", lambda paths: 0)
        capture(*GREEDY, "--format", "compact")
    before = saved(data)
    assert len(before) == 6
    assert not shard_writing.merge_shards(shards)
    assert [path.relative_to(shards).as_posix() for path in shards.rglob("*.safetensors")] == ["+/1.safetensors"]
    assert saved(data) == before


def test_a_shard_that_cannot_be_divided_is_an_error(
    extract: Run, capture: Run, tlcapture: Run, data: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract()
    capture(*GREEDY, "--format", "compact")
    before, replace = saved(data), os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).parent == shards:
            raise OSError(errno.ENOSPC, "")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    refused = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--format", "json")
    assert refused.exit_code == 1
    assert "1.safetensors: cannot be written: No space left on device" in refused.stderr
    assert saved(data) == before


def test_shards_have_bounded_sizes(extract: Run, capture: Run, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract()
    monkeypatch.setattr(shard_writing, "MOST_BYTES", 20_000)
    capture(*GREEDY, "--format", "compact")
    assert len(list(shards.rglob("*.safetensors"))) >= 2
