"""Captures and vectors of each engine and TransformerLens version are readable with every other one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.stored_experiments import (
    ATTENTION,
    INTERNALS,
    LOGIT_LENS,
    PROJECT,
    PROJECTION,
    RESIDUALS,
    STORED,
    VECTORS,
    VIEWS,
    command,
    make_data,
    make_experiment,
)
from tests.test_parity import relative, run_hugging_face
from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.models.checkpoints.checkpoint import fingerprint
from tlcapture.storage.files import read_json

MAKERS = (*tiny.ENGINES, *sorted(path.name for path in STORED.iterdir()))
ROUNDED = 1e-3  # tolerance for files with 4 significant digits
GetFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> GetFolder:
    """Returns the experiment folder of a maker: an engine of this environment, or a folder of `tests/stored`."""

    @cache
    def folder(maker: str) -> Path:
        if maker in tiny.ENGINES:
            return make_experiment(tmp_path_factory.mktemp(maker), tiny_folder, maker)
        return STORED / maker

    return folder


@pytest.fixture
def copied(tmp_path: Path, made: GetFolder) -> GetFolder:
    """Copies a maker's experiment without its views into a new root."""

    def copy(maker: str, name: str = "exp") -> Path:
        if not (tmp_path / "datasets").exists():
            make_data(tmp_path)
        folder = tmp_path / "experiments" / name
        views = shutil.ignore_patterns("analysis", "internals", "runs", "config.json")
        shutil.copytree(made(maker), folder, ignore=views)
        return folder

    return copy


def attention(folder: Path) -> list[Tensor]:
    """Attention weights of each token, `[layer, head, key]`."""
    return [torch.tensor(entry["by_layer"]) for entry in read_json(folder / ATTENTION)["attention"]]


def lens(folder: Path) -> list[Any]:
    """Rank and probability of the actual token, and the top probabilities, for each token and layer."""
    entries = [layer for token in read_json(folder / LOGIT_LENS)["predictions"] for layer in token["by_layer"]]
    return [(entry["actual_rank"], entry["actual_prob"], *(top["prob"] for top in entry["top_k"])) for entry in entries]


def internals(folder: Path) -> dict[str, Tensor]:
    """The activations of an internals file in float32."""
    content = torch.load(folder / INTERNALS, weights_only=True)
    return {name: value.float() for name, value in content.items() if isinstance(value, Tensor)}


def projections(folder: Path) -> Tensor:
    """The projections of prompt and response, `[token, ...]`."""
    parts = read_json(folder / PROJECTION)["projections"]
    return torch.tensor([*parts["prompt"], *parts["response"]])


@pytest.mark.parametrize("maker", MAKERS)
def test_captures_of_all_makers_have_the_same_tokens_and_checkpoint(maker: str, made: GetFolder) -> None:
    capture = Capture.open(made(maker) / RESIDUALS)
    assert capture.metadata["model_fingerprint"] == fingerprint(tiny.hf_model("llama"))
    assert capture.metadata["engine"] == maker.split("-")[0]
    theirs = run_hugging_face("llama", capture.token_ids)
    assert theirs.logits[0, 2:-1].argmax(-1).tolist() == capture.response.token_ids
    for layer in range(3):
        assert relative(capture.residual(layer, "residual_in"), theirs.hidden_states[layer][0]) < 1e-4


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_replay_on_any_engine_equals_a_capture_on_that_engine(
    maker: str, engine: str, made: GetFolder, copied: GetFolder, tiny_folder: Path
) -> None:
    folder, own = copied(maker), made(engine)
    runs_on = ("--model", tiny_folder, "--engine", engine, "--device", "cpu")
    command(folder.parents[1], "capture", "--replay", "--no-project", *runs_on, *VIEWS)
    for ours, theirs in zip(attention(folder), attention(own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=ROUNDED, atol=1e-5)
    assert len(lens(own)) == 3 * 6
    for ours, theirs in zip(lens(folder), lens(own), strict=True):
        assert ours == pytest.approx(theirs, rel=ROUNDED)
    for other in {own, made(maker)} - {STORED / maker}:
        ours, theirs = internals(folder), internals(other)
        assert ours.keys() == theirs.keys()
        for name, activation in ours.items():
            assert relative(activation, theirs[name]) < ROUNDED, name


@pytest.mark.parametrize("extracted_by", MAKERS)
@pytest.mark.parametrize("captured_by", MAKERS)
def test_captures_of_any_maker_can_be_projected_onto_vectors_of_any_other(
    captured_by: str, extracted_by: str, made: GetFolder, copied: GetFolder
) -> None:
    folder, vectors = copied(captured_by), copied(extracted_by, "other")
    (folder / PROJECTION).unlink()
    result = command(
        folder.parents[1], "project", "--prompt-set", "short", "--vector-experiment", vectors.name, *PROJECT
    )
    assert "another" not in result.output
    for maker in (captured_by, extracted_by):
        torch.testing.assert_close(projections(folder), projections(made(maker)), rtol=1e-4, atol=1e-4)
    for layer in range(3):
        ours, theirs = (
            torch.load(made(maker) / VECTORS / f"mean_diff_layer{layer}.pt", weights_only=True)
            for maker in (captured_by, extracted_by)
        )
        assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_activation_cache_of_a_capture_works_on_every_engine(
    maker: str, engine: str, copied: GetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = Experiment("exp", copied(maker).parents[1])
    monkeypatch.setitem(exp.__dict__, "model", tiny.model("llama", engine))
    cap = exp.captures("short")[1]
    ids = torch.tensor(cap.token_ids)
    theirs = run_hugging_face("llama", cap.token_ids)
    final = cap.cache.accumulated_resid()[-1:]
    found = cap.cache.logit_attrs(final, ids, has_batch_dim=False)[0]
    torch.testing.assert_close(found, theirs.logits[0].gather(-1, ids[:, None])[:, 0], rtol=1e-3, atol=1e-3)
    normed, labels = cap.cache.accumulated_resid(apply_ln=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    torch.testing.assert_close(normed[-1], theirs.hidden_states[-1][0], rtol=1e-3, atol=1e-3)
