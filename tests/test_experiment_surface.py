"""`Experiment` in Python: what it is made of, by the names that people guess."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import tlcapture
from tests import dataclasses_of_arrays
from tests.cli.conftest import make_data
from tests.conftest import quick_evaluations, unrendered_figures
from tests.docstring_examples import docstring, documented, examples, without_example
from tests.samples import projected
from tlcapture import Experiment
from tlcapture.cli.output.top_traits import _doubts
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.errors import InputError, VectorError
from tlcapture.explore import doubts
from tlcapture.explore.figures.drawing import mean_trajectory_figure
from tlcapture.explore.figures.set_means import SetLine, mean_of
from tlcapture.explore.notebook.completion import completions
from tlcapture.explore.notebook.magics import load_ipython_extension
from tlcapture.names import Trait
from tlcapture.page.contents import Contents
from tlcapture.storage.files import read_json, read_tensors, write_json
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.vector_files import VectorFiles


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
    assert len(exp.carry_over) == 0 and {"dataset", "trait", "auroc", "p"} <= set(exp.carry_over.columns)


def test_verdicts_are_those_that_evaluate_prints(doubtful: Experiment) -> None:
    content = read_json(doubtful.layout.evaluation)
    found = doubtful.verdicts.set_index("trait")
    for trait, written in content["best_vectors"].items():
        assert found.loc[trait, "nested_auroc"] == written["nested_auroc"]
        assert found.loc[trait, "layer"] == written["layer"]
        assert [found.loc[trait, "gain_low"], found.loc[trait, "gain_high"]] == written["gain_interval"]
    loud = found.loc["tone/loud"]
    assert (loud["layer_0"], loud["words"]) == (0.8, 0.9) and math.isnan(loud["lengths"])
    assert loud["verdict"].startswith("adds nothing")
    scored = {"method": "probe", "layer": 1, "component": "residual", "auroc": 0.75, "p": 0.01, "n_positive": 8}
    write_json(doubtful.layout.evaluation, {**content, "carry_over": {"more": {"tone/loud": [scored]}}})
    (row,) = doubtful.carry_over.to_dict("records")
    assert row["dataset"] == "more" and {name: row[name] for name in scored} == scored


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


def test_frames_and_figures_compare_layers_each_with_its_own_vector(exp: Experiment) -> None:
    cap = exp.captures["short"]["1"]
    frame = cap.to_pandas("tone/loud", layer=[0, 2], method="probe")
    for layer in (0, 2):
        along = exp.vectors["tone/loud"].by("probe").tensors[layer]
        scores = frame[frame["layer"] == layer]["score"].to_numpy()
        assert scores == pytest.approx((cap.residual(layer).float() @ along / along.norm()).numpy(), rel=1e-4, abs=1e-4)
        assert not frame[frame["layer"] == layer]["calibrated"].isna().any()
    assert len(frame) == 2 * cap.n_tokens
    titles = {trace.name for trace in cap.plot.trajectory("tone/loud", layer=[0, 2]).data if trace.name}
    assert any("layer 0" in title for title in titles) and any("layer 2" in title for title in titles)
    with pytest.raises(InputError, match="give one layer, layer=12"):
        cap.plot.layers("tone/loud", layer=[0, 2])


def test_an_experiment_is_opened_by_the_path_of_its_folder(exp: Experiment) -> None:
    assert Experiment(str(exp.layout.folder)).layout == exp.layout
    with pytest.raises(InputError, match=r"expected \.\.\./experiments/NAME, or its name"):
        Experiment(str(exp.root))


def test_a_key_without_a_capture_says_where_it_is(exp: Experiment) -> None:
    captures = exp.captures["short"]
    with pytest.raises(KeyError, match=r"has captures .*; by position: \.at\(0\)"):
        captures[0]
    with pytest.raises(TypeError, match=r"several by position are list\(captures\)\[:3\]"):
        captures[:2]  # type: ignore[index]
    with pytest.raises(KeyError, match=r"cap.attention\(layer\) and cap.internals\(layer\) compute them"):
        captures[1].cache["pattern", 99]


def test_a_misspelt_attribute_or_option_names_those_there_are(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    with pytest.raises(AttributeError, match="SavedCapture has no attribute 'logitlens': did you mean 'logit_lens'"):
        _ = cap.logitlens
    assert not hasattr(cap, "nothing") and cap.sample is None
    with pytest.raises(InputError, match="no option 'layers': expected layer, method, component or vector_experiment"):
        cap.plot.trajectory("tone/loud", layers=[0, 1])


def test_the_frame_of_a_lens_has_its_numbers(exp: Experiment) -> None:
    lens = exp.captures["short"][1].logit_lens()
    frame = lens.to_pandas()
    assert len(frame) == lens.n_layers * lens.n_predictions
    cell = frame[(frame["layer"] == 2) & (frame["token_idx"] == 3)].squeeze()
    assert (cell["token"], cell["actual_token"]) == (lens.tokens[3], lens.tokens[4])
    assert (cell["top_token"], cell["top_prob"]) == (lens.top_tokens[2][3][0], lens.top_probs[2, 3, 0])
    assert (cell["actual_rank"], cell["actual_prob"]) == (lens.actual_rank[2, 3], lens.actual_prob[2, 3])
    wide = frame.pivot(index="layer", columns="token_idx", values="actual_rank")
    assert (wide.to_numpy() == lens.actual_rank).all()
    first = frame[frame["actual_part"] == "response"]["token_idx"].min()
    assert first == lens.n_prompt_tokens - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_frames_of_lenses_and_heads_are_put_together_and_merged_by_the_ids_of_prompts(exp: Experiment) -> None:
    captures = exp.captures["short"]
    lenses = pandas.concat(cap.logit_lens().to_pandas() for cap in captures)
    heads = pandas.concat(cap.head_summary() for cap in captures)
    ids = {cap.prompt_id for cap in captures}
    assert set(lenses["prompt_id"]) == set(heads["prompt_id"]) == ids
    scores = captures.to_pandas("tone/loud")
    merged = scores.merge(lenses, on=["prompt_id", "sample", "token_idx", "token"])
    assert len(merged) == len(lenses)


def test_heads_of_a_stored_and_of_a_live_capture_are_averaged_over_the_response(exp: Experiment) -> None:
    saved = exp.captures["short"][1]
    (live,) = tlcapture.capture(exp.model, [saved], attention=True)
    columns = ["layer", "head", "entropy", "distance", "first", "previous", "self"]
    frame, again = saved.head_summary(), live.head_summary()
    assert set(frame["part"]) == {"response"} and set(frame["n_queries"]) == {len(saved.response.tokens)}
    np.testing.assert_allclose(frame[columns], again[columns], atol=2e-3)
    patterns = saved.attention(1).patterns[:, len(saved.prompt.tokens) :]
    np.testing.assert_allclose(frame[frame["layer"] == 1]["first"], patterns[:, :, 0].mean(axis=1), rtol=1e-5)
    (heat,) = live.plot.attention_heads("previous").data
    np.testing.assert_allclose(heat.z.ravel(), again["previous"])
    assert (heat.zmin, heat.zmax) == (0, 1) and "weight on the previous token" in heat.colorbar.title.text
    (none,) = tlcapture.capture(exp.model, "hi", max_new_tokens=1)
    with pytest.raises(InputError, match="attention=True"):
        none.head_summary()


def test_rises_and_projections_of_a_set_have_the_same_ids(exp: Experiment) -> None:
    captures = exp.captures["short"]
    assert set(captures.rises()["prompt_id"]) == set(captures.to_pandas()["prompt_id"]) == {cap.id for cap in captures}


def test_a_capture_is_saved_to_and_opened_from_a_path_as_text(exp: Experiment, tmp_path: Path) -> None:
    cap = exp.captures["short"][1]
    cap.capture.save(f"{tmp_path}/one.pt")
    assert tlcapture.Capture.open(f"{tmp_path}/one.pt").token_ids == cap.token_ids


def test_a_direction_of_ones_own_is_projected_onto(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    direction = torch.randn(cap.d_model, generator=torch.Generator().manual_seed(0))
    found = cap.project(direction, layer=1)
    expected = cap.residual(1).float() @ direction / direction.norm()
    torch.testing.assert_close(found.trajectory, expected, rtol=1e-4, atol=1e-4)
    assert found.tokens == tuple(cap.tokens)
    assert [each.vector.layer for each in cap.project(direction, layer=[0, 1])] == [0, 1]
    with pytest.raises(InputError, match="pass layer=12"):
        cap.project(direction)
    with pytest.raises(VectorError, match=r"of shape \[3\]: expected \[32\]"):
        cap.project(torch.ones(3), layer=1)
    with pytest.raises(VectorError, match="zero, or holds NaN"):
        cap.project(torch.zeros(32), layer=1)
    with pytest.raises(VectorError, match=r"of type NoneType: expected a tensor or an array \[32\]"):
        cap.project(None, layer=1)  # type: ignore[arg-type]


def test_a_direction_may_be_an_array_and_take_the_place_of_a_trait_anywhere(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    direction = np.random.default_rng(0).standard_normal(cap.d_model)
    expected = cap.project(torch.tensor(direction), layer=1).trajectory.numpy()
    frame = cap.to_pandas(direction, layer=1)
    assert frame["score"].to_numpy() == pytest.approx(expected) and set(frame["trait"]) == {"own/direction"}
    assert len(cap.to_pandas(np.array(["tone/loud"]), layer=1)) == len(frame)  # names, as pandas' `unique` returns
    assert set(cap.to_pandas(["tone/loud", direction], layer=1)["trait"]) == {"tone/loud", "own/direction"}
    both = cap.project(np.stack([direction, -direction]), layer=1)
    assert both[1].trajectory.numpy() == pytest.approx(-expected)
    assert cap.coloured(direction, layer=1).scores == pytest.approx(expected)
    *_, answer = cap.by_span(direction, layer=1)
    assert answer["mean"] == pytest.approx(expected[len(cap.prompt.tokens) :].mean(), rel=1e-4)


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
    one = projected()
    found = mean_of([SetLine.of(one), SetLine.of(projected())], lambda line: line.trajectory)
    start = list(found.positions).index(0)
    assert math.isnan(found.mean[0])  # the attention sink
    assert found.mean[start] == one.trajectory[one.n_prompt_tokens]
    assert (found.spread[start], found.n[start]) == (0, 2)
    assert np.isnan(mean_of([SetLine.of(one)], lambda line: line.trajectory).spread).all()


def test_a_mean_says_of_how_many_responses_it_is() -> None:
    long = projected()
    whole, short = SetLine.of(long), SetLine.of(projected(tokens=long.tokens[:6], scores=long.scores[:6]))
    figure = mean_trajectory_figure({"short": [whole, whole, short]}, calibrated=False)
    numbers = dict(zip(figure.data[1].x, figure.data[1].customdata, strict=True))
    assert (numbers[2], numbers[3]) == (3, 2)
    assert [note.text for note in figure.layout.annotations] == [
        "a token that fewer responses have is their mean alone"
    ]
    assert not mean_trajectory_figure({"short": [whole, whole]}, calibrated=False).layout.annotations


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
    assert lines[0].line.color == one.data[1].line.color != lines[1].line.color
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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_chance_level_of_a_projection_is_that_of_its_file(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    for found in cap.project(["tone/loud", "tone/warm"]):
        file = exp.layout.projection(found.vector.trait, "residual", "short", "1")
        written = read_json(file)["metadata"]["chance"]
        ours = found.chance.to_json()
        assert np.allclose(ours.pop("rises"), written.pop("rises"), rtol=2e-3, atol=2e-3)
        assert np.allclose(ours.pop("standardised_rises"), written.pop("standardised_rises"), rtol=2e-3, atol=2e-3)
        assert ours.pop("reference_rises") == pytest.approx(written.pop("reference_rises"), rel=1e-5)
        assert ours == pytest.approx(written, abs=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_direction_of_ones_own_has_a_chance_level_of_its_own(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    one, other = torch.randn(2, cap.d_model, generator=torch.Generator().manual_seed(3))
    first, _, again = (cap.project(each, layer=1).chance for each in (one, other, one))
    second = cap.project(other, layer=1).chance
    assert first.reference_rises == again.reference_rises
    assert first.reference_rises != second.reference_rises
    assert list(first.rises) == list(second.rises)  # of the same random directions


def test_rises_of_a_set_are_those_of_the_page_and_stand_out_beyond_their_chance(exp: Experiment) -> None:
    rises = exp.captures["short"].rises()
    rows = Contents(exp.root).overview("exp", "short", "residual")["rows"]
    assert {(row.prompt_id, row.trait): row.rise for row in rises.itertuples()} == {
        (row["id"], trait): rise for row in rows for trait, rise in row["rises"].items()
    }
    assert (rises["stands_out"] == (rises["rise"] > rises["chance"])).all()
    assert {row.trait: row.layer for row in rises.itertuples()} == {
        trait: exp.vectors[trait].selected.layer for trait in exp.vectors
    }
    top = rises.loc[rises.groupby("prompt_id")["rise"].idxmax()].set_index("prompt_id")["stands_out"]
    assert dict(top) == {row["id"]: row["stands_out"] for row in rows}
    with pytest.raises(InputError, match="no attn_out projections"):
        exp.captures["short"].rises("attn_out")
    with pytest.raises(InputError, match="choose one of residual, attn_out"):
        exp.captures["short"].rises("mlp")


DOUBT = "adds nothing over bag of words that its examples can show, by 'tlcapture evaluate'"


@pytest.fixture
def doubtful(exp: Experiment) -> Iterator[Experiment]:
    """The experiment with a verdict on `tone/loud` that it adds nothing."""
    doubts._told.clear()
    content = read_json(exp.layout.evaluation)
    judged = {
        **content["best_vectors"]["tone/loud"],
        "gain": 0.01, "gain_interval": [-0.1, 0.1], "p": 0.01, "verdict": "adds nothing over bag of words (0.900)",
        "baselines": {"layer 0": 0.8, "bag of words": 0.9, "tokens": None},
    }  # fmt: skip
    shown = {**judged, "gain_interval": [0.01, 0.1]}
    verdicts = {**content["best_vectors"], "tone/loud": judged, "tone/warm": shown}
    write_json(exp.layout.evaluation, {**content, "best_vectors": verdicts})
    yield exp
    write_json(exp.layout.evaluation, content)
    doubts._told.clear()


def test_a_doubt_about_a_vector_is_told_once_where_it_is_used_in_python(doubtful: Experiment) -> None:
    cap = doubtful.captures["short"][1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cap.project(["tone/loud", "tone/warm"])
        cap.to_pandas("tone/loud")
        doubtful.captures["short"].to_pandas("tone/loud")
    told = [str(each.message) for each in caught if "adds nothing" in str(each.message)]
    assert told == [f"tone/loud: {DOUBT}"]
    ways: list[Callable[[], object]] = [
        lambda: cap.coloured("tone/loud"),
        lambda: cap.plot.trajectory("tone/loud"),
        lambda: doubtful.captures["short"].to_pandas("tone/loud"),
        lambda: doubtful.captures["short"].plot.trajectory("tone/loud"),
    ]
    for way in ways:
        doubts._told.clear()
        with pytest.warns(UserWarning, match=f"tone/loud: {DOUBT}") as found:
            way()
        assert {each.filename for each in found} == {__file__}  # the user's own line, not one of the package
    rises = doubtful.captures["short"].rises().set_index("trait")["doubt"]
    assert set(rises["tone/loud"]) == {DOUBT}
    assert rises["tone/warm"].isna().all()


def test_a_doubt_about_a_vector_is_told_on_the_page_and_in_the_summary(doubtful: Experiment) -> None:
    page = Contents(doubtful.root)
    assert page.overview("exp", "short", "residual")["doubts"] == [f"tone/loud: {DOUBT}"]
    warned = {each["trait"]: each["warnings"] for each in page.prompt("exp", "short", "1")["projections"]}
    assert warned == {"tone/loud": [DOUBT], "tone/warm": []}
    found = summary_of(doubtful.layout, "short")
    tops = [replace(found.tops[0], trait=trait, rise=9.0, chance=1.0) for trait in ("tone/loud", "tone/warm")]
    assert list(_doubts(doubtful.layout, replace(found, tops=tops))) == [f"tone/loud: {DOUBT}"]
    assert not list(_doubts(doubtful.layout, replace(found, tops=tops[1:])))


def test_a_doubt_about_a_vector_is_told_beside_a_comparison(doubtful: Experiment) -> None:
    with pytest.warns(UserWarning, match=f"tone/loud: {DOUBT}"):
        doubtful.compare("exp/short@steered", "short", kl=False)
    page = Contents(doubtful.root)
    (compared,) = page.comparisons("exp")
    assert page.compared_set("exp", compared["other"], compared["prompt_set"])["doubts"] == [f"tone/loud: {DOUBT}"]


def test_a_doubt_is_not_told_of_a_vector_that_was_extracted_since(doubtful: Experiment) -> None:
    page = Contents(doubtful.root)
    found = next(each for each in page.prompt("exp", "short", "1")["projections"] if each["trait"] == "tone/loud")
    vector = found["vector"]
    path = VectorFiles(doubtful.layout, Trait.parse("tone/loud")).file("residual", vector["method"], vector["layer"])
    before = path.read_bytes()
    torch.save(-torch.load(path), path)
    try:
        assert page.overview("exp", "short", "residual")["doubts"] == []
    finally:
        path.write_bytes(before)


# -- completion in IPython ------------------------------------------------------------------------


@pytest.fixture
def complete(exp: Experiment) -> Iterator[Callable[[str], list[str]]]:
    """What IPython offers for a line with `exp`, `captures` and `cap` at hand."""
    from IPython.core.completer import provisionalcompleter
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=config)
    load_ipython_extension(shell)
    captures = exp.captures["short"]
    shell.push({"exp": exp, "captures": captures, "cap": captures[1]})

    def offered(line: str) -> list[str]:
        with provisionalcompleter():
            return [each.text for each in shell.Completer.completions(line, len(line))]

    yield offered
    shell.restore_sys_module_state()
    InteractiveShell.clear_instance()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('exp.captures["', ["short", "short@steered"]),
        ('exp.captures["short"]["', ["1", "2", "3"]),
        ('exp.captures["short"][1].project("tone/w', ["tone/warm"]),
        ('exp.captures["short"].at(0).residual(1, "aft', ["after_attn"]),
        ('captures["', ["1", "2", "3"]),
        ('exp.vectors["tone/', ["tone/loud", "tone/warm"]),
        ('cap.project("tone/l', ["tone/loud"]),
        ('cap.project("tone/loud", method="probe", layer=1), cap.project("', ["tone/loud", "tone/warm"]),
        ('cap.plot.trajectory("tone/loud", "tone/w', ["tone/warm"]),
        ('captures.to_pandas("', ["tone/loud", "tone/warm"]),
        ('exp.to_pandas("short", "tone/', ["tone/loud", "tone/warm"]),
        ('cap.residual(1, "aft', ["after_attn"]),
        ("cap.plot.attention_", ["attention_heads", "attention_matrix"]),
        ("captures.ri", ["rises"]),
    ],
)
def test_ipython_completes_sets_ids_traits_points_and_figures(
    complete: Callable[[str], list[str]], line: str, expected: list[str]
) -> None:
    found = [each.strip("\"'").removeprefix(".") for each in complete(line)]
    assert {*expected} <= {*found}
    if "(" in line:
        assert found == expected


def test_a_completion_of_nothing_known_is_none(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    called: list[str] = []
    names = {"cap": cap, "own": called.append, "text": "tone/loud"}
    lines = ('nothing.project("', 'cap.save("', 'cap.project("x/', "cap.project(", 'text.residual(1, "', 'text["', "")
    assert not any(completions(line, names) for line in (*lines, 'own("x").project("', 'own("x")["'))
    assert not called  # a completion calls nothing of the user's


# -- examples in docstrings -----------------------------------------------------------------------

# What the examples are about, and what is there in its place.
IN_PLACE = {
    '"single_trait@formal"': '"short@steered"', "my_exp/single_trait@formal": "exp/short@steered",
    '"single_trait"': '"short"', '"my_exp"': '"exp"', "behavioral/refusal": "tone/loud", "style/formality": "tone/warm",
    "[12]": "[1]", "(12)": "(1)", "(12, ": "(1, ", "layer=12": "layer=1", "@12": "@1", "layers=12": "layers=1",
    "blocks.12": "blocks.1", '", 12]': '", 1]', "[8, 12]": "[0, 1]", "[8, -1]": "[0, -1]", "52, 55": "5, 7",
}  # fmt: skip


def test_every_public_docstring_has_an_example() -> None:
    assert without_example() == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, thing in documented() if examples(docstring(thing))])
def test_the_examples_of_a_docstring_run(
    name: str, exp: Experiment, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLCAPTURE_ROOT", str(exp.root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    captures = exp.captures["short"]
    names = {each: getattr(tlcapture, each) for each in tlcapture.__all__}
    names |= {"exp": exp, "captures": captures, "cap": captures[1], "refusal": exp.vectors["tone/loud"], "Path": Path}
    names |= {"Trait": Trait, "TokenScores": TokenScores, "direction": torch.ones(32)}
    if name.startswith("OfflineFigure"):
        names["figure"] = captures[1].plot.trajectory("tone/loud")
    if name.startswith("LogitLensTable"):
        names["lens"] = captures[1].logit_lens()
    if name.startswith("AttentionHeads"):
        names["heads"] = captures[1].attention(1)
    if name.startswith("LiveCapture"):
        monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path))
        (names["cap"],) = tlcapture.capture(exp.model, "hello", max_new_tokens=2)
    for code in examples(docstring(dict(documented())[name])):
        for old, new in {**IN_PLACE, '"smollm2"': repr(str(tiny_folder))}.items():
            code = code.replace(old, new)
        exec(code, names)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_everything_in_reach_compares_and_has_a_hash_where_it_is_frozen(exp: Experiment) -> None:
    cap = exp.captures["short"][1]
    cap.add_note("look", 1)
    loud = exp.vectors["tone/loud"]
    things = [
        cap.capture,
        cap.project("tone/loud"),
        cap.projected("tone/loud"),
        cap.coloured(),
        cap.notes,
        loud.selected,
    ]
    things += [cap.attention(1), cap.logit_lens(), exp.config, tlcapture.Steer("tone/loud", 0.2), tlcapture.Sampling()]
    found = dataclasses_of_arrays.reached(things)
    assert {"Capture", "CapturedPart", "ResidualStream", "Projection", "TraitVector", "Dynamics", "ChanceLevel"} <= {
        kind.__name__ for kind in found
    }
    for kind, thing in found.items():
        assert (thing == thing) is True
        assert (thing == copy(thing)) in (True, False)
        if kind.__dataclass_params__.frozen:
            assert len({thing, thing}) == 1, kind
