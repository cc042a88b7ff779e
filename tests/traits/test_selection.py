"""Which vector is selected, and what selects it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlcapture.errors import InputError, StorageError, VectorError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.selection import fallback_layer, select, steering_results
from tlcapture.traits.statistics.critical_values import critical_score
from tlcapture.traits.steering_files import SteeringRun, largest_by_chance
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector

TRAIT = Trait("behavioral", "refusal")


@pytest.fixture
def files(tmp_path: Path) -> VectorFiles:
    made = VectorFiles(Layout(tmp_path, "exp"), TRAIT)
    for method in ("mean_diff", "probe"):
        for layer in range(0, 30, 2):
            write_vector(made, "residual", method, layer, torch.ones(4))
    write_vector(made, "attn_out", "gradient", 3, torch.ones(4))
    return made


def evaluation(files: VectorFiles, *rows: dict[str, Any]) -> None:
    content = {"all_results": [{"trait": str(TRAIT), "component": "residual", **row} for row in rows]}
    files.layout.evaluation.write_text(json.dumps(content))


def steering(files: VectorFiles, *runs: tuple[int, float, float], nulls: dict[int, list[float]] | None = None) -> None:
    path = files.layout.steering(TRAIT)
    path.parent.mkdir(parents=True)
    content = {
        "baseline": {"trait_mean": 40.0, "coherence_mean": 99.0},
        "runs": [
            {
                "config": {"layers": [layer], "methods": ["mean_diff"], "coefficients": [1.0], "component": "residual"},
                "result": {"trait_mean": trait_mean, "coherence_mean": coherence, "n": 16}
                | ({"null": nulls[layer]} if nulls and layer in nulls else {}),
            }
            for layer, trait_mean, coherence in runs
        ],
    }
    path.write_text(json.dumps(content))


def test_available_vectors_are_found_by_component_and_method(files: VectorFiles) -> None:
    assert list(files.available("residual")) == ["probe", "mean_diff"]
    assert files.available("attn_out") == {"gradient": [3]}


def test_a_score_of_a_vector_that_was_replaced_is_ignored(files: VectorFiles) -> None:
    evaluation(
        files,
        {"method": "probe", "layer": 4, "val_effect_size": 9.0, "vector_digest": files.digest("residual", "probe", 4)},
        {"method": "probe", "layer": 6, "val_effect_size": 5.0, "vector_digest": files.digest("residual", "probe", 6)},
    )
    assert (select(files, "residual", 30).layer, select(files, "residual", 30).warning) == (4, None)
    write_vector(files, "residual", "probe", 4, torch.arange(1.0, 5.0))
    chosen = select(files, "residual", 30)
    assert chosen.layer == 6
    assert str(chosen.warning).startswith("a higher score, of probe at layer 4, is left out")
    files.file("residual", "probe", 4).write_bytes(b"PK")
    assert select(files, "residual", 30).warning == chosen.warning
    write_vector(files, "residual", "probe", 6, torch.arange(1.0, 5.0))
    chosen = select(files, "residual", 30)
    assert (chosen.layer, chosen.selected_by) == (16, "fallback")
    assert "its scores are of earlier vectors" in str(chosen.warning)


def test_a_layer_that_is_named_keeps_the_selected_method(files: VectorFiles) -> None:
    assert select(files, "residual", 30, layer=8).method == "probe"
    evaluation(files, {"method": "mean_diff", "layer": 4, "val_effect_size": 9.0})
    assert select(files, "residual", 30, layer=8).method == "mean_diff"
    assert select(files, "residual", 30, layer=8, method="probe").method == "probe"
    write_vector(files, "residual", "probe", 7, torch.ones(4))
    assert select(files, "residual", 30, layer=7).method == "probe"


def test_the_best_coherent_steering_run_comes_first(files: VectorFiles) -> None:
    evaluation(files, {"method": "probe", "layer": 4, "val_effect_size": 9.0})
    steering(files, (8, 60.0, 90.0), (10, 75.0, 71.0), (12, 95.0, 69.9))
    found = select(files, "residual", 30)
    assert (found.layer, found.method, found.selected_by, found.score) == (10, "mean_diff", "steering", 35.0)


def test_results_without_random_vectors_select_as_ever_and_are_said_to_have_none(files: VectorFiles) -> None:
    steering(files, (10, 75.0, 90.0))
    found = select(files, "residual", 30)
    assert (found.layer, found.selected_by) == (10, "steering")
    assert found.warning is not None
    assert "was not compared with random vectors" in found.warning


def test_a_gain_is_taken_only_where_it_beats_the_best_gains_of_random_vectors(files: VectorFiles) -> None:
    evaluation(files, {"method": "probe", "layer": 4, "val_effect_size": 9.0})
    # The best of each random vector: 0 to 17, 10.5 and 20.
    nulls = {8: [float(n) for n in range(18)] + [-9.0, 20.0], 10: [-1.0] * 18 + [10.5, -9.0]}
    steering(files, (8, 60.1, 90.0), (10, 59.9, 90.0), nulls=nulls)
    found = select(files, "residual", 30)
    assert (found.layer, found.selected_by, found.warning) == (8, "steering", None)
    files.layout.steering(TRAIT).unlink()
    files.layout.steering(TRAIT).parent.rmdir()
    steering(files, (8, 59.9, 90.0), (10, 59.9, 90.0), nulls=nulls)
    found = select(files, "residual", 30)
    assert (found.layer, found.method, found.selected_by) == (4, "probe", "effect_size")


@pytest.mark.parametrize("n_random", [20, 39, 200])
def test_a_vector_like_random_ones_is_beyond_chance_in_a_twentieth_of_cases(n_random: int) -> None:
    gains = np.random.default_rng(0).permutation(n_random + 1).astype(float).tolist()
    beyond = 0
    for own in range(n_random + 1):  # each of equally likely vectors in turn
        null = tuple(gain for number, gain in enumerate(gains) if number != own)
        chance = largest_by_chance([SteeringRun(0, "probe", "residual", 0.1, 50.0, 90.0, gains[own], null=null)])
        assert chance is not None
        beyond += gains[own] > chance
    assert 0.045 <= beyond / (n_random + 1) <= 0.05


@pytest.mark.parametrize("n_cells", [9, 90])
def test_the_best_of_many_cells_is_seldom_beyond_what_random_vectors_reach_at_three(n_cells: int) -> None:
    """Their best of three alone was exceeded by the best of 9 cells in 13 %, and of 90 in 44 %."""
    generator, beyond, draws = np.random.default_rng(0), 0, 200
    for _ in range(draws):
        own, random = generator.standard_normal(n_cells), generator.standard_normal((n_cells, 20))
        best = np.argsort(-own)[:3]
        runs = [
            SteeringRun(n, "probe", "residual", 0.1, 50.0, 90.0, own[n], null=tuple(random[n]) if n in best else None)
            for n in range(n_cells)
        ]
        chance = largest_by_chance(runs)
        assert chance is not None
        beyond += own.max() > chance
    assert beyond / draws <= 0.06


@pytest.mark.parametrize("n_layers", [1, 10])
def test_the_best_of_several_coefficients_is_seldom_beyond_chance_and_each_layer_counts_once(n_layers: int) -> None:
    generator, beyond, draws, coefficients = np.random.default_rng(0), 0, 150, np.array([0.1, 0.15, 0.2, 0.25, 0.3])
    for _ in range(draws):
        slopes = generator.standard_normal((21, n_layers, 1))
        own, *random = (slopes * coefficients + 0.03 * generator.standard_normal((21, n_layers, 5))).reshape(21, -1)
        best, cells = np.argsort(-own)[:3], [divmod(number, 5) for number in range(own.size)]
        runs = [
            SteeringRun(
                layer, "probe", "residual", coefficients[number], 50.0, 90.0, own[cell],
                null=tuple(each[cell] for each in random) if cell in best else None,
            )
            for cell, (layer, number) in enumerate(cells)
        ]  # fmt: skip
        chance = largest_by_chance(runs)
        assert chance is not None
        beyond += own.max() > chance
    assert beyond / draws <= 0.06
    as_if_apart = largest_by_chance([replace(run, layer=cell) for cell, run in enumerate(runs)])
    assert chance < (as_if_apart or 0.0)


def test_steering_with_a_vector_that_was_replaced_or_removed_is_left_out(files: VectorFiles) -> None:
    steering(files, (4, 60.0, 90.0), (6, 50.0, 90.0), nulls={4: [30.0] * 20})
    path = files.layout.steering(TRAIT)
    content = json.loads(path.read_text())
    monitored = {"method": "mean_diff", "coefficients": [0.0, 1.0], "rank_correlation": 0.5}
    content["monitoring"] = [{**monitored, "layer": layer} for layer in (4, 6)]
    for layer, *records in zip((4, 6), content["runs"], content["monitoring"], strict=True):
        write_vector(files, "residual", "mean_diff", layer, torch.ones(4))
        for record in records:
            record["vector_digest"] = files.digest("residual", "mean_diff", layer)
    path.write_text(json.dumps(content))
    assert [run.layer for run in steering_results(files).single_layer_runs] == [4, 6]
    write_vector(files, "residual", "mean_diff", 4, torch.arange(1.0, 5.0))
    found = steering_results(files)
    assert [each.layer for each in (*found.single_layer_runs, *found.monitoring)] == [6, 6]
    assert select(files, "residual", 30).layer == 6  # earlier vectors' nulls are no level for this one
    files.file("residual", "mean_diff", 6).unlink()
    assert not steering_results(files).runs


def test_effect_size_comes_second(files: VectorFiles) -> None:
    evaluation(
        files,
        {"method": "probe", "layer": 4, "val_effect_size": 1.0},
        {"method": "mean_diff", "layer": 6, "val_effect_size": 2.5},
        {"method": "mean_diff", "layer": 7, "val_effect_size": 9.9},  # no such vector
        {"method": "mean_diff", "layer": 8, "val_effect_size": None},
        {"method": "probe", "layer": 8, "val_effect_size": 5.0, "component": "attn_out"},
        {"method": "probe", "layer": 8, "val_effect_size": 5.0, "trait": "other/trait"},
    )
    steering(files, (12, 95.0, 10.0))
    found = select(files, "residual", 30)
    assert (found.layer, found.method, found.selected_by, found.score) == (6, "mean_diff", "effect_size", 2.5)


def test_a_gain_by_subtracting_a_vector_does_not_select_it(files: VectorFiles) -> None:
    steering(files, (4, 75.0, 90.0), (6, 60.0, 90.0))
    path = files.layout.steering(TRAIT)
    content = json.loads(path.read_text())
    content["runs"][0]["config"]["coefficients"] = [-0.2]
    path.write_text(json.dumps(content))
    found = select(files, "residual", 30)
    assert (found.layer, found.selected_by, found.score) == (6, "steering", 20.0)


def test_a_method_asked_for_narrows_the_choice(files: VectorFiles) -> None:
    evaluation(
        files,
        {"method": "probe", "layer": 4, "val_effect_size": 1.0},
        {"method": "mean_diff", "layer": 6, "val_effect_size": 2.5},
    )
    assert select(files, "residual", 30, method="probe").layer == 4


def test_the_fallback_is_layer_16_with_a_warning(files: VectorFiles) -> None:
    found = select(files, "residual", 30)
    assert (found.layer, found.method, found.selected_by) == (16, "probe", "fallback")
    assert found.warning is not None
    assert "layer 16 by default" in found.warning
    assert f"'tlcapture evaluate --experiment exp --root {files.layout.root}' would choose one" in found.warning


def test_the_fallback_is_layer_16_also_where_only_a_later_method_has_it(tmp_path: Path) -> None:
    files = VectorFiles(Layout(tmp_path, "exp"), TRAIT)
    write_vector(files, "residual", "probe", 3, torch.ones(4))
    write_vector(files, "residual", "mean_diff", 16, torch.ones(4))
    found = select(files, "residual", 30)
    assert (found.layer, found.method) == (16, "mean_diff")
    assert "no vector" not in str(found.warning)


def test_evaluating_again_is_no_advice_where_evaluation_found_no_effect_size(files: VectorFiles) -> None:
    evaluation(files, *({"method": "probe", "layer": layer, "val_effect_size": None} for layer in (2, 4)))
    warning = str(select(files, "residual", 30).warning)
    assert "tlcapture evaluate" not in warning
    steer = f"tlcapture steer --experiment exp --root {files.layout.root}"
    assert f"its examples give no effect size; other examples, or '{steer}', would choose one" in warning


@pytest.mark.parametrize(("n_layers", "layer"), [(30, 16), (17, 16), (16, 9), (12, 7), (6, 3), (1, 0)])
def test_shallower_models_fall_back_to_six_tenths_of_their_depth(n_layers: int, layer: int) -> None:
    assert fallback_layer(n_layers) == layer


def test_the_warning_for_a_shallow_model_states_why_it_is_not_layer_16(files: VectorFiles) -> None:
    found = select(files, "residual", 12)
    assert found.layer == 6  # 7 has no vector
    assert found.warning is not None
    assert "no layer 16" in found.warning
    assert "no vector at layer 7" in found.warning


def test_an_override_wins_and_must_exist(files: VectorFiles) -> None:
    steering(files, (10, 75.0, 90.0))
    found = select(files, "residual", 30, layer=2)
    assert (found.layer, found.method, found.selected_by) == (2, "mean_diff", "override")
    with pytest.raises(VectorError, match=r"by 'probe' at layer 3 .* available layers: probe: 0, 2, 4"):
        select(files, "residual", 30, layer=3)


def test_without_vectors_the_error_names_the_command(tmp_path: Path) -> None:
    empty = VectorFiles(Layout(tmp_path, "exp"), TRAIT)
    with pytest.raises(
        VectorError, match=r"run 'tlcapture extract --experiment exp --root .* --traits behavioral/refusal'"
    ):
        select(empty, "residual", 30)


@pytest.mark.parametrize("content", ["[]", "{}", '{"all_results": [{"trait": "behavioral/refusal"}]}', "nonsense"])
def test_a_damaged_evaluation_is_an_error_with_its_file(files: VectorFiles, content: str) -> None:
    files.layout.evaluation.write_text(content)
    with pytest.raises((VectorError, StorageError), match=r"extraction_evaluation\.json"):
        select(files, "residual", 30)


@pytest.mark.parametrize("content", ["[]", "{}", '{"baseline": {"trait_mean": 1}, "runs": [{}]}', "nonsense"])
def test_damaged_steering_results_are_an_error_with_their_file(files: VectorFiles, content: str) -> None:
    steering(files)
    files.layout.steering(TRAIT).write_text(content)
    with pytest.raises((VectorError, StorageError), match=r"results\.json"):
        select(files, "residual", 30)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2, 2), "one-dimensional"),
        (torch.ones(4, dtype=torch.int64), "float tensor"),
        (torch.zeros(4), "zero, or holds NaN"),
        (torch.tensor([1.0, float("nan")]), "zero, or holds NaN"),
        ({"vector": torch.ones(4)}, "one-dimensional"),
    ],
)
def test_a_file_that_holds_no_direction_is_an_error(files: VectorFiles, value: Any, said: str) -> None:
    torch.save(value, files.file("residual", "probe", 0))
    with pytest.raises(VectorError, match=said):
        read_vector(files, "residual", "probe", 0)


def test_vectors_without_metadata_are_read_and_of_unknown_origin(files: VectorFiles) -> None:
    assert read_vector(files, "residual", "probe", 0).model is None


def test_a_layer_may_be_a_numpy_integer_but_not_another_word(files: VectorFiles) -> None:
    assert select(files, "residual", 30, layer=np.int64(4)).layer == 4
    with pytest.raises(InputError, match="'best' is neither a number nor 'auto'"):
        select(files, "residual", 30, layer="best")


@pytest.mark.parametrize(("n", "exceeded"), [(20, 1 / 21), (99, 5 / 100), (100, 5 / 101)])
def test_one_more_random_vector_exceeds_the_level_of_a_gain_in_at_most_a_twentieth_of_cases(
    n: int, exceeded: float
) -> None:
    draws = np.random.default_rng(n).normal(size=(4000, n + 1))
    levels = [run.null_p95 for run in (gains(rest)[0] for rest in draws[:, 1:].tolist())]
    assert np.mean(draws[:, 0] > np.array(levels)) == pytest.approx(exceeded, abs=0.012)
    assert gains([])[0].null_p95 is None


def gains(null: Sequence[float]) -> list[SteeringRun]:
    """Runs at ten layers, of which one has been compared with random vectors."""
    runs = [SteeringRun(layer, "probe", "residual", 1.0, 0.0, 100.0, 0.0) for layer in range(10)]
    return [replace(runs[0], null=tuple(null)), *runs[1:]]


def test_the_level_of_the_best_of_many_gains_follows_the_skewness_of_random_ones_upwards_alone() -> None:
    upwards = np.random.default_rng(0).exponential(size=20)
    upwards = (upwards - upwards.mean()) / upwards.std(ddof=1)
    score = critical_score(10, 20)
    scaled = upwards / upwards.std()
    skewness = (scaled**3).mean()
    assert skewness > 0.5
    assert largest_by_chance(gains(upwards)) == pytest.approx(score + skewness * (score**2 - 1) / 6)
    assert largest_by_chance(gains(-upwards)) == pytest.approx(score)
    shifted = largest_by_chance(gains(3 + 2 * upwards))
    assert shifted == pytest.approx(3 + 2 * (score + skewness * (score**2 - 1) / 6))


@pytest.mark.parametrize("null", [(5.0,), (5.0, 5.0, 5.0)])
def test_random_gains_without_a_deviation_have_a_level(null: tuple[float, ...]) -> None:
    assert largest_by_chance(gains(null)) == 5.0
