"""Exports of an experiment with something of every kind come back as it was, from each of the formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests.cli.conftest import make_prompt_set
from tlcapture.captures.capture import Capture
from tlcapture.captures.notes import read_notes
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.projections.saved import all_saved

Run = Callable[..., Result]
FORMATS = ("datasets", "parquet", "safetensors", "json")
EVERYTHING = ("--activations", "all", "--points", "all")
SET = ("--prompt-set",)
# Prompts and options of each capture of the experiment.
CAPTURES: tuple[tuple[Any, ...], ...] = (
    (*SET, "short", "--capture-attn", "--save-dtype", "bfloat16"),
    (*SET, "other", "--samples", 3, "--temperature", 1),
    (*SET, "short", "--steer", "tone/loud:+0.5@1", "--variant", "calm", "--tokens", "response"),
    (*SET, "short", "--ablate", "tone/warm@all", "--save-dtype", "float16", "--format", "compact"),
    (*SET, "short", "--projections-only", "--variant", "bare", "--steer", "tone/loud:+0.1@1", "--layers", "1,2"),
    (
        *SET,
        "general/deep/mine",
        "--tokens",
        "-2:",
        "--layers",
        "0,2",
        "--points",
        "residual_in,after_attn",
        "--no-project",
    ),
    (*SET, "general/mixed", "--max-new-tokens", 1, "--no-chat-template"),
    (*SET, "general/mixed", "--tokens", "5:", "--variant", "nothing", "--steer", "tone/loud:+0.1@1", "--no-project"),
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the experiment is kept that the tests begin with, once it has been made."""
    return tmp_path_factory.mktemp("kept") / "exp"


@pytest.fixture
def made(capture: Run, extract: Run, tlcapture: Run, data: Path, kept: Path) -> Layout:
    """An experiment with captures of every kind."""
    layout = Layout(data, "exp")
    if kept.exists():
        shutil.copytree(kept, layout.folder)
        return layout
    extract()
    general = data / "datasets" / "inference" / "general"
    (general / "deep").mkdir(parents=True)
    make_prompt_set(data, "general/deep/mine", ["with \x00 and \ud7ff, ‏עברית‏ 😀", "two\r\nlines"])
    mixed = [{"id": 7, "text": "a number"}, {"id": "07", "text": "a text"}, {"id": "a_b.s1x", "text": "\\\"'"}]
    (general / "mixed.json").write_text(json.dumps(mixed))
    for words in CAPTURES:
        done = capture(*words[2:], prompts=words[:2])
        assert done.exit_code == 0, done.output
    shutil.copytree(layout.folder, kept)
    return layout


def back(tlcapture: Run, data: Path, *words: object) -> Layout:
    """The experiment as it comes back from an export."""
    done = tlcapture("export", "--experiment", "exp", "--to", data / "out", *words)
    assert done.exit_code == 0, done.output
    done = tlcapture("import", data / "out", "--experiment", "again")
    assert done.exit_code == 0, done.output
    return Layout(data, "again")


def assert_same_capture(one: Capture, other: Capture) -> None:
    assert dict(one.metadata) == dict(other.metadata)
    assert one.spans == other.spans
    for part in ("prompt", "response"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert (ours.text, ours.tokens, ours.token_ids) == (theirs.text, theirs.tokens, theirs.token_ids)
        assert ours.positions == theirs.positions
        for kind in ("points", "attn_out"):
            tensors = [getattr(each.residual, kind) for each in (ours, theirs)]
            assert tensors[0] is None or tensors[0].dtype == tensors[1].dtype
            assert (tensors[0] is None) == (tensors[1] is None)
            assert tensors[0] is None or torch.equal(*tensors)


def assert_same(one: Layout, other: Layout, *, with_activations: bool = True) -> None:
    n_projections = 0
    for prompt_set in one.prompt_sets():
        names = one.prompt_ids(prompt_set)
        come_back = [name for name in names if with_activations or all_saved(one, prompt_set, name)]
        assert other.prompt_ids(prompt_set) == come_back, prompt_set
        for name in come_back:
            raw = [each.residual(prompt_set, name) for each in (one, other)]
            assert raw[1].is_file() == (with_activations and raw[0].is_file())
            if raw[1].is_file():
                assert_same_capture(Capture.open(raw[0]), Capture.open(raw[1]))
            found = [
                {(str(p.trait), p.component): p.content() for p in all_saved(each, prompt_set, name)}
                for each in (one, other)
            ]
            assert found[0] == found[1], (prompt_set, name)
            n_projections += len(found[0])
            assert [note.model_dump() for note in read_notes(one, prompt_set, name).notes] == [
                note.model_dump() for note in read_notes(other, prompt_set, name).notes
            ]
    assert n_projections > 20
    for path in one.folder.glob("extraction/**/vectors/*"):
        assert (other.folder / path.relative_to(one.folder)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("form", FORMATS)
def test_an_experiment_with_everything_comes_back_to_the_last_bit(
    made: Layout, tlcapture: Run, data: Path, form: str
) -> None:
    assert_same(made, back(tlcapture, data, "--format", form, *EVERYTHING))


@pytest.mark.parametrize("form", FORMATS)
def test_without_activations_everything_else_comes_back(made: Layout, tlcapture: Run, data: Path, form: str) -> None:
    assert_same(made, back(tlcapture, data, "--format", form), with_activations=False)


def test_datasets_opens_an_experiment_with_everything(made: Layout, tlcapture: Run, data: Path) -> None:
    from datasets import load_dataset

    back(tlcapture, data, *EVERYTHING)
    options = {"split": "train", "cache_dir": str(data / "cache")}
    captures = load_dataset(str(data / "out"), "captures", **options)
    tokens = load_dataset(str(data / "out"), **options)
    every = [(each, name) for each in made.prompt_sets() for name in made.prompt_ids(each)]
    assert [(row["prompt_set"], row["file"]) for row in captures] == every
    assert len(tokens) == sum(captures["n_tokens"])
    seven = Capture.open(made.residual("general/mixed", 7))
    rows = [row for row in tokens if (row["prompt_set"], row["file"]) == ("general/mixed", "7")]
    assert torch.equal(torch.tensor([row["residual_out_L2"] for row in rows]), seven.residual(2).float())
    calm = [row["residual_out_L2"] for row in tokens if (row["prompt_set"], row["file"]) == ("short@calm", "1")]
    n_prompt = len(Capture.open(made.residual("short@calm", "1")).prompt.tokens)
    assert not any(calm[:n_prompt]) or not any(any(row) for row in calm[:n_prompt])
    assert any(calm[-1])


@pytest.mark.parametrize("form", FORMATS)
def test_vectors_alone_are_exported_and_come_back(extract: Run, tlcapture: Run, data: Path, form: str) -> None:
    extract()
    exported, came = Layout(data, "exp"), back(tlcapture, data, "--format", form)
    found = {path.relative_to(exported.folder) for path in exported.folder.glob("extraction/**/vectors/*")}
    assert found == {path.relative_to(came.folder) for path in came.folder.glob("extraction/**/vectors/*")}
    assert came.prompt_sets() == []


def test_an_experiment_with_nothing_is_refused_in_one_line(tlcapture: Run, data: Path) -> None:
    (data / "experiments" / "exp").mkdir(parents=True)
    done = tlcapture("export", "--experiment", "exp", "--to", data / "out")
    assert (done.exit_code, (data / "out").exists()) == (2, False)
    assert "has neither captures nor vectors" in done.output


def test_repeng_imports_the_control_vectors(
    made: Layout, tlcapture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """repeng 0.4.0, if it is installed."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # it is of before NumPy 2
    repeng = pytest.importorskip("repeng", reason="repeng is not installed")
    back(tlcapture, data)
    found = repeng.ControlVector.import_gguf(data / "out" / "vectors" / "tone" / "loud.mean_diff.gguf")
    assert found.model_type == "llama"
    vectors = made.folder / "extraction" / "tone" / "loud" / "vectors"
    norms = json.loads((vectors / "metadata.json").read_bytes())["typical_norms"]
    assert found.directions.keys() == {1, 2}
    for layer, direction in found.directions.items():
        stored = torch.load(vectors / f"mean_diff_layer{layer}.pt", weights_only=True)
        expected = stored / stored.norm() * norms[layer]
        assert torch.allclose(torch.tensor(direction), expected, rtol=1e-5, atol=1e-6)
