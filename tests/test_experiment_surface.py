"""`Experiment` in Python: what it is made of, by the names that people guess."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.conftest import make_data
from tests.conftest import quick_evaluations, unrendered_figures
from tests.samples import projected
from tlcapture import Experiment
from tlcapture.errors import InputError, VectorError
from tlcapture.explore.set_means import aligned, mean_and_spread
from tlcapture.storage.files import read_tensors


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Experiment:
    """Vectors of two traits, evaluated, and three captures with attention and internals."""
    from click.testing import CliRunner

    from tlcapture.cli.main import main

    root = make_data(tmp_path_factory.mktemp("surface"))
    common = ("--experiment", "exp", "--root", root, "--model", tiny_folder)
    steered = ("--steer", "tone/loud:+0.5@1", "--variant", "steered")
    lines: list[tuple[Any, ...]] = [
        ("extract", *common, "--traits", "tone/loud,tone/warm"),
        ("evaluate", *common[:4]),
        ("capture", *common, "--prompt-set", "short", "--max-new-tokens", 6, "--attention", "--layer-internals", 1),
        ("capture", *common, "--prompt-set", "short", "--max-new-tokens", 6, *steered),
    ]
    with quick_evaluations(), unrendered_figures():
        for line in lines:
            done = CliRunner().invoke(main, list(map(str, line)), catch_exceptions=False)
            assert done.exit_code == 0, done.output
    return Experiment("exp", root)


def test_it_says_its_name_its_root_and_its_runs(exp: Experiment) -> None:
    assert exp.name == "exp"
    assert Experiment.list(exp.root) == ["exp"]
    assert list(exp.runs["command"]) == ["extract", "evaluate", "capture", "capture"]
    assert set(exp.runs["status"]) == {"done"}


def test_vectors_are_found_by_trait_with_layers_tensors_and_scores(exp: Experiment) -> None:
    assert list(exp.vectors) == ["tone/loud", "tone/warm"]
    loud = exp.vectors["tone/loud"].by("mean_diff")
    assert loud.layers == [0, 1, 2]
    folder = exp.layout.folder / "extraction/tone/loud/vectors"
    assert torch.equal(loud.tensors[1], read_tensors(folder / "mean_diff_layer1.pt"))
    assert sorted(loud.scores["layer"]) == [0, 1, 2]
    assert set(loud.scores["method"]) == {"mean_diff"}
    assert exp.vectors["tone/loud"].selected.selected_by in ("effect_size", "fallback")
    assert exp.vectors("attn_out")["tone/loud"].by("probe").layers == [0, 1, 2]
    assert "used: " in repr(exp.vectors["tone/loud"])


def test_a_trait_without_vectors_is_named_with_those_that_have_some(exp: Experiment) -> None:
    with pytest.raises(InputError, match="available traits: tone/loud, tone/warm"):
        exp.vectors["tone/soft"]
    with pytest.raises(InputError, match="it has probe, mean_diff, gradient"):
        exp.vectors["tone/loud"].by("pca")


def test_evaluation_and_steering_are_frames(exp: Experiment) -> None:
    assert set(exp.evaluation["trait"]) == {"tone/loud", "tone/warm"}
    assert {"method", "layer", "component", "val_auroc"} <= set(exp.evaluation.columns)
    assert len(exp.steering) == 0
    assert {"coefficient", "gain", "null_p95"} <= set(exp.steering.columns)


def test_captures_are_found_by_id_and_by_position_and_iterated(exp: Experiment) -> None:
    captures = exp.captures["short"]
    assert captures[2].id == captures["2"].id == "2"
    assert captures.at(0).id == "1"
    assert captures.at(-1).id == "3"
    assert [cap.id for cap in captures] == captures.keys() == ["1", "2", "3"]
    assert len(captures) == 3
    assert 2 in captures and "9" not in captures
    assert [name for name, _ in captures.items()] == captures.keys()
    with pytest.raises(IndexError, match="has 3 captures"):
        captures.at(3)
    with pytest.raises(KeyError, match="has captures 1, 2, 3"):
        captures[9]


def test_a_capture_knows_its_id_text_and_number_of_tokens(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    assert cap.n_tokens == len(cap) == len(cap.tokens)
    assert cap.text == cap.prompt.text + cap.response.text
    assert bool(cap)


def test_negative_layers_count_from_the_last_and_points_have_two_names(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    last = cap.residual(2, "residual_out")
    assert torch.equal(cap.residual(-1), last)
    assert torch.equal(cap.residual(-1, "resid_post"), last)
    assert torch.equal(cap.residual(-1, "hook_resid_post"), last)
    assert torch.equal(cap.residual(1, "resid_pre"), cap.residual(0, "residual_out"))
    assert torch.equal(cap.residual(1, "resid_mid"), cap.residual(1, "after_attn"))
    assert cap.attention(-1).layer == 2
    assert cap.project("tone/loud", layer=-1).vector.layer == 2
    with pytest.raises(InputError, match="no layer -4: the model has layers 0 to 2"):
        cap.residual(-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_several_traits_and_layers_are_projected_at_once(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    found = cap.project(["tone/loud", "tone/warm"], layer=[0, -1])
    assert [(str(each.vector.trait), each.vector.layer) for each in found] == [
        ("tone/loud", 0),
        ("tone/warm", 0),
        ("tone/loud", 2),
        ("tone/warm", 2),
    ]
    torch.testing.assert_close(found[0].trajectory, cap.project("tone/loud", layer=0).trajectory)
    assert isinstance(cap.project(["tone/loud"]), list)


def test_a_direction_of_ones_own_is_projected_onto(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    direction = torch.randn(cap.d_model, generator=torch.Generator().manual_seed(0))
    found = cap.project(direction, layer=1)
    expected = cap.residual(1).float() @ direction / direction.norm()
    torch.testing.assert_close(found.trajectory, expected, rtol=1e-4, atol=1e-4)
    assert found.tokens == tuple(cap.tokens)
    assert [each.vector.layer for each in cap.project(direction, layer=[0, 1])] == [0, 1]
    with pytest.raises(InputError, match="say which, layer=12"):
        cap.project(direction)
    with pytest.raises(VectorError, match=r"of shape \[3\]: expected \[32\]"):
        cap.project(torch.ones(3), layer=1)
    with pytest.raises(VectorError, match="zero, or holds NaN"):
        cap.project(torch.zeros(32), layer=1)


def test_internals_are_those_of_the_file_or_of_a_forward_pass(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    stored = cap.internals(1)
    assert stored["blocks.1.attn.hook_pattern"].shape == (4, cap.n_tokens, cap.n_tokens)
    computed = cap.internals(0)
    assert computed.keys() == {name.replace("blocks.1", "blocks.0") for name in stored}
    torch.testing.assert_close(
        computed["blocks.0.hook_resid_post"].float(), cap.residual(0).float(), rtol=2e-3, atol=2e-3
    )
    assert torch.equal(cap.internals(-2)["blocks.1.mlp.hook_post"], stored["blocks.1.mlp.hook_post"])


def test_the_cache_has_the_stored_patterns_and_internals(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    pattern = cap.cache["pattern", 2]
    assert pattern.shape == (4, cap.n_tokens, cap.n_tokens)
    np.testing.assert_allclose(pattern.numpy(), cap.attention(2).patterns)
    assert torch.equal(cap.cache["post", 1], cap.internals(1)["blocks.1.mlp.hook_post"].float())
    with pytest.raises(KeyError, match="hook_q"):
        cap.cache["q", 0]


def test_the_mean_of_a_set_starts_with_its_responses_and_needs_two_prompts() -> None:
    one, other = projected(), projected()
    places, rows = aligned([one, other], calibrated=False)
    start = list(places).index(0)
    assert rows[0, start] == one.trajectory[one.n_prompt_tokens]
    assert math.isnan(rows[0, 0])  # the attention sink
    mean, spread = mean_and_spread(rows)
    assert mean[start] == one.trajectory[one.n_prompt_tokens]
    assert spread[start] == 0
    alone, _ = mean_and_spread(rows[:1])
    assert np.isnan(alone).all()


def test_a_set_has_a_frame_and_a_figure(exp: Experiment) -> None:
    captures = exp.captures["short"]
    frame = captures.to_pandas("tone/loud")
    assert list(frame["prompt_id"].unique()) == ["1", "2", "3"]
    figure = captures.plot.trajectory("tone/loud")
    line = figure.data[1]
    at_0 = list(line.x).index(0)
    by_prompt = frame[frame["part"] == "response"].groupby("prompt_id").first()["calibrated"]
    assert line.y[at_0] == pytest.approx(by_prompt.mean(), rel=1e-6)


def test_two_sets_are_drawn_side_by_side(exp: Experiment) -> None:
    both = exp.captures["short"].plot.trajectory("tone/loud", beside="short@steered")
    one, other = (exp.captures[name].plot.trajectory("tone/loud") for name in ("short", "short@steered"))
    lines = [trace for trace in both.data if trace.mode != "none" and trace.line.width]
    assert [line.line.dash for line in lines] == ["solid", "dash"]
    assert [line.line.color for line in lines] == [one.data[1].line.color] * 2
    for line, alone in zip(lines, (one, other), strict=True):
        assert list(line.y) == list(alone.data[1].y)
    assert "tone/loud, short@steered (3 responses)" in lines[1].name


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_a_figure_is_saved_in_the_form_that_its_name_says(
    exp: Experiment, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = exp.captures["short"][1].plot.trajectory("tone/loud")
    path = figure.save(tmp_path / f"figure{suffix}")
    starts: dict[str, Callable[[bytes], bool]] = {
        ".png": lambda data: data.startswith(b"\x89PNG"),
        ".svg": lambda data: b"<svg" in data[:1000],
        ".html": lambda data: b"<html" in data[:200],
    }
    assert starts[suffix](path.read_bytes())
    with pytest.raises(InputError, match="expected a name that ends in"):
        figure.save(tmp_path / "figure.doc")
