"""JSON readers: a damaged file is refused with a one-line error that names it, or its content is read correctly.

The oracle is Python's `json` module with separate rules for each format, never the readers' own models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evidence import Evidence
from tests.input.strategies import Damaged, check_refusal, damaged_json, replaced, try_all, without
from tests.page.conftest import N_HEADS, N_LAYERS, TRAIT, attention, logit_lens, projection
from tlcapture.commands.evaluate import draw_heatmaps
from tlcapture.commands.project import ProjectOptions, run_project
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.commands.steer import draw_curves, read_questions
from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.names import Trait, is_safe_name
from tlcapture.prompts.prompt_sets import read_prompt_set
from tlcapture.runs.report import RunReport
from tlcapture.storage.experiments.config import read_config, update_config
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.evaluation_files import Evaluation
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.selection import effect_sizes, select, steering_runs
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector
from tlcapture.views.saved_attention import read_attention
from tlcapture.views.saved_lens import read_lens

ODD = Trait.parse(TRAIT)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def content_of(file: Damaged) -> Any:
    """The content of the file as read by Python's `json` module."""
    return json.loads(file.data.decode("utf-8-sig"))


def reads(path: Path, read: Callable[[], Any]) -> Any:
    """The result of a reader, or `None` if it refuses the file with a proper error."""
    try:
        return read()
    except TlcaptureError as error:
        check_refusal(error, path)
        return None


def test_damaged_prompt_sets_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    prompts = [{"id": "1", "text": "hello", "note": "n"}, {"id": 2, "text": "é", "system_prompt": "x"}]
    good = {"name": "mine", "description": "d", "system_prompt": "s", "prompts": prompts}
    path = tmp_path / "datasets" / "inference" / "mine.json"

    def check(file: Damaged) -> None:
        file.put(path)
        found = reads(path, lambda: read_prompt_set(Datasets(tmp_path), "mine"))
        if found is None:
            return
        content = content_of(file)
        prompts = content if isinstance(content, list) else content["prompts"]
        expected = [(p["id"], p["prompt"] if "prompt" in p else p["text"]) for p in prompts]
        assert [(each.id, each.text) for each in found.prompts] == expected
        assert [type(each.id) for each in found.prompts] == [type(each) for each, _ in expected]
        assert all(is_safe_name(str(each.id)) and each.text.strip() for each in found.prompts)
        assert found.name == "mine"

    try_all(evidence, "prompt set", damaged_json(good), check)


def test_damaged_configs_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    good = {"extraction_model": "a", "inference_model": "b", "use_chat_template": True, "system_prompt": None, "x": [1]}
    layout = Layout(tmp_path, "exp")
    path = layout.config

    def check(file: Damaged) -> None:
        file.put(path)
        found = reads(path, lambda: read_config(layout))
        if found is None:
            return
        content = content_of(file)
        for name in ("extraction_model", "inference_model", "use_chat_template", "system_prompt"):
            assert getattr(found, name) == content.get(name)
            assert type(getattr(found, name)) in (str, bool, type(None))
        try:
            update_config(layout, inference_model="another")
        except TlcaptureError as error:
            check_refusal(error, path)
        else:
            expected = {**read_json(file.put(path)), **_defaults(content), "inference_model": "another"}
            update_config(layout, inference_model="another")
            assert read_json(path) == expected

    def _defaults(content: dict[str, Any]) -> dict[str, Any]:
        names = ("extraction_model", "inference_model", "use_chat_template", "system_prompt")
        return {name: None for name in names if name not in content}

    try_all(evidence, "config.json", damaged_json(good), check)


def test_damaged_vector_metadata_is_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    good = {"extraction_model": "m", "methods": ["probe"], "layers": [1, 2], "num_layers": 3, "hidden_dim": 4,
            "position": "response_mean", "split": {"seed": 0}, "model_fingerprint": "f"}  # fmt: skip
    folder = VectorFiles(Layout(tmp_path, "exp"), ODD)
    write_vector(folder, "residual", "probe", 1, torch.ones(4))
    path = folder.metadata_file("residual")

    def check(file: Damaged) -> None:
        file.put(path)
        try:
            found = read_vector(folder, "residual", "probe", 1)
        except TlcaptureError as error:
            check_refusal(error, path, folder.file("residual", "probe", 1))
            return
        content = content_of(file)
        assert isinstance(content, dict)
        listed = "probe" in content.get("methods", []) and 1 in content.get("layers", [])
        assert found.model == (content.get("extraction_model") if listed else None)
        assert found.model is None or type(found.model) is str
        assert not listed or content.get("hidden_dim") in (None, 4)

    try_all(evidence, "metadata of vectors", damaged_json(good), check)


ROW = {
    "trait": TRAIT,
    "method": "probe",
    "layer": 1,
    "component": "residual",
    "val_accuracy": 0.9,
    "val_auroc": 0.8,
    "val_effect_size": 1.5,
    "val_effect_size_interval": [1.0, 2.0],
    "random_auroc": 0.5,
    "random_auroc_p95": 0.6,
}


def test_damaged_evaluations_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    rows = [ROW, {"trait": TRAIT, "method": "probe", "layer": 2, "val_effect_size": 0.5}]
    layout = Layout(tmp_path, "exp")
    folder = VectorFiles(layout, ODD)
    for layer in (1, 2):
        write_vector(folder, "residual", "probe", layer, torch.ones(4))
    path = layout.evaluation

    def check(file: Damaged) -> None:
        file.put(path)
        sizes = reads(path, lambda: effect_sizes(folder, "residual"))
        if sizes is None:
            return
        of_trait = [row for row in content_of(file)["all_results"] if row["trait"] == TRAIT]
        assert all(type(row["layer"]) is int and row["layer"] >= 0 for row in of_trait)
        measured = [row for row in of_trait if row["val_effect_size"] is not None]
        own = [row for row in measured if row.get("component", "residual") == "residual"]
        assert sizes == {(row["method"], row["layer"]): float(row["val_effect_size"]) for row in own}
        assert all(is_number(row["val_effect_size"]) for row in own)
        assert all(row.get("val_auroc") is None or 0 <= row["val_auroc"] <= 1 for row in of_trait)
        assert Evaluation.read(layout.evaluation).by_trait == {}
        chosen = select(folder, "residual", 3)
        there = {key: size for key, size in sizes.items() if key in [("probe", 1), ("probe", 2)]}
        assert chosen.score == max(there.values(), default=None)

    try_all(evidence, "extraction_evaluation.json", damaged_json({"all_results": rows}), check)


def test_an_evaluation_with_few_fields_is_drawn(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    layout.evaluation.parent.mkdir(parents=True)
    rows = [{"trait": TRAIT, "method": "$x", "layer": 3, "val_effect_size": None}, {**ROW, "val_auroc": None}]
    layout.evaluation.write_text(json.dumps({"all_results": rows}))
    draw_heatmaps(layout, RunReport(tmp_path))
    assert layout.picture(ODD, "evaluation").is_file()


RUN = {
    "config": {"layers": [1], "methods": ["probe"], "coefficients": [0.2], "component": "residual"},
    "result": {"trait_mean": 60.0, "coherence_mean": 90.0, "n": 15},
}
SHORT_RUN = {"config": {"layers": [2], "methods": ["probe"]}, "result": {"trait_mean": 55, "coherence_mean": 71}}
RESULTS = {"baseline": {"trait_mean": 50.0, "coherence_mean": 100.0}, "runs": [RUN, SHORT_RUN]}


def test_damaged_steering_results_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    folder = VectorFiles(Layout(tmp_path, "exp"), ODD)
    for layer in (1, 2):
        write_vector(VectorFiles(folder.layout, ODD), "residual", "probe", layer, torch.ones(4))
    path = folder.layout.steering(ODD)

    def check(file: Damaged) -> None:
        file.put(path)
        found = reads(path, lambda: steering_runs(folder))
        if found is None:
            return
        content = content_of(file)
        runs = [run for run in content["runs"] if len(run["config"]["layers"]) == 1]
        assert len(found) == len(runs)
        for one, run in zip(found, runs, strict=True):
            means = run["result"]
            assert (one.layer, one.method) == (run["config"]["layers"][0], run["config"]["methods"][0])
            assert type(one.layer) is int and one.layer >= 0
            assert one.component == run["config"].get("component", "residual") in ("residual", "attn_out")
            assert (one.trait_mean, one.coherence_mean) == (means["trait_mean"], means["coherence_mean"])
            assert is_number(means["trait_mean"]) and 0 <= means["trait_mean"] <= 100
            assert one.delta == means["trait_mean"] - content["baseline"]["trait_mean"]
        select(folder, "residual", 3)

    try_all(evidence, "steering results", damaged_json(RESULTS), check)
    unknown = {**RUN, "config": {**RUN["config"], "component": "mlp_out"}}
    path.write_text(json.dumps({**RESULTS, "runs": [unknown]}))
    with pytest.raises(StorageError, match=r"component: expected 'residual' or 'attn_out', found 'mlp_out'"):
        steering_runs(folder)


def test_steering_results_with_few_fields_are_drawn(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    layout.steering(ODD).parent.mkdir(parents=True)
    layout.steering(ODD).write_text(json.dumps({"baseline": {"trait_mean": 50}, "runs": RESULTS["runs"]}))
    draw_curves(layout, [ODD], RunReport(tmp_path))
    assert layout.picture(ODD, "steering").is_file()


def test_damaged_steering_questions_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    question = {"id": "1", "question": "why?", "positive": "yes", "negative": "no"}
    good = {"questions": [question, "what?"], "eval_prompt": "Rate {answer} to {question}"}
    path = tmp_path / "datasets" / "traits" / TRAIT / "steering.json"

    def check(file: Damaged) -> None:
        file.put(path)
        found = reads(path, lambda: read_questions(Datasets(tmp_path), ODD))
        if found is not None:
            content = content_of(file)
            asked = content if isinstance(content, list) else content["questions"]
            assert found.eval_prompt == (None if isinstance(content, list) else content.get("eval_prompt"))
            for number, (one, given) in enumerate(zip(found.questions, asked, strict=True), start=1):
                given = {"question": given} if isinstance(given, str) else given
                bare = {"id": str(number), "positive": None, "negative": None}
                assert one.model_dump() == {**bare, **given}
                assert (one.completions is None) == (given.get("positive") is None)

    try_all(evidence, "steering questions", damaged_json(good), check)


# -- files derived from a capture --------------------------------------------------------------------


def are_scores(content: dict[str, Any]) -> bool:
    """Whether the projections of a file are finite numbers of one shape, one row per token."""
    tokens = [*content["prompt"]["tokens"], *content["response"]["tokens"]]
    rows = [*content["projections"]["prompt"], *content["projections"]["response"]]
    shapes = {(len(row), len(at)) for row in rows for at in row}
    numbers = all(is_number(value) for row in rows for at in row for value in at)
    parts = [content[name] for name in ("prompt", "response")]
    counts = all(part.get("n_tokens") in (None, len(part["tokens"])) for part in parts)
    layer = content["metadata"]["vector_source"]["layer"]
    is_layer = type(layer) is int and 0 <= layer < len(rows[0])
    return numbers and counts and is_layer and len(shapes) == 1 and len(rows) == len(tokens)


def test_damaged_projection_files_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    layout = Layout(tmp_path, "exp")
    raw = layout.residual("odd", "1")
    raw.parent.mkdir(parents=True)
    raw.touch()
    path = layout.projection(ODD, "residual", "odd", "1")

    def check(file: Damaged) -> None:
        file.put(path)
        line = reads(path, lambda: TokenScores.read(path))
        if line is not None:
            content = content_of(file)
            assert are_scores(content)
            layer = content["metadata"]["vector_source"]["layer"]
            rows = [*content["projections"]["prompt"], *content["projections"]["response"]]
            assert line.trajectory.tolist() == [float(row[layer][-1]) for row in rows]
            assert list(line.tokens) == [*content["prompt"]["tokens"], *content["response"]["tokens"]]
            point = content["dynamics"]["commitment_point"]
            assert point is None or (type(point) is int and 0 <= point < len(rows))
        summary_of(layout, "odd")

    try_all(evidence, "projection file", damaged_json(projection(1)), check)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (("metadata", "vector_source", "layer"), N_LAYERS, "a vector of layer 3, but scores of 3 layers"),
        (("metadata", "sublayers"), ["residual_out"], "3 scores per layer, but 1 sublayers"),
        (("prompt", "n_tokens"), 3, "prompt: n_tokens is 3, but tokens has 2"),
        (("response", "tokens"), ["a"], "response: n_tokens is 4, but tokens has 1"),
        (("projections", "prompt"), [], "the numbers of projections and tokens differ: 0 for 2 tokens of the prompt"),
        (("projections", "prompt", 0), [[1.0]], "its tokens differ in their numbers of layers or sublayers"),
        (("projections", "prompt", 0, 1), [1.0, 2.0], "its tokens differ in their numbers of layers or sublayers"),
        (("projections", "prompt", 0, 1, 0), "1.0", "projections.prompt[0][1][0]: expected a number, found"),
        (("projections", "prompt", 0, 1, 0), True, "projections.prompt[0][1][0]: expected a number, found"),
        (("projections", "prompt", 0, 1, 0), None, "projections.prompt[0][1][0]: expected a number, found"),
        (
            ("projections", "prompt", 0, 1, 0),
            1e308,
            "projections.prompt[0][1][0]: expected a number of at most 3.5e+38, found",
        ),
        (("dynamics", "commitment_point"), 6, "commitment point 6 of 6 tokens"),
        (("dynamics", "persistence"), 6, "persistence of 6 in 6 tokens"),
        (("dynamics", "velocity"), [1.0], "velocity has 1 values for 6 tokens, expected 5"),
    ],
)
def test_an_inconsistent_projection_file_is_refused_with_the_field(
    tmp_path: Path, evidence: Evidence, at: tuple[str | int, ...], value: Any, reason: str
) -> None:
    path = tmp_path / "1.json"
    path.write_text(json.dumps(replaced(projection(1), at, value)))
    with pytest.raises(StorageError) as caught:
        TokenScores.read(path)
    assert f"{path}: not a valid projection file: " in str(caught.value)
    assert reason in str(caught.value)
    evidence.tried("projection file", "inconsistent parts")


@pytest.mark.parametrize(
    "at",
    [
        ("prompt", "text"),
        ("prompt", "n_tokens"),
        ("dynamics", "velocity"),
        ("dynamics", "acceleration"),
        ("dynamics", "peak_velocity"),
        ("metadata", "vector_source", "model"),
        ("metadata", "vector_source", "selected_by"),
        ("metadata", "inference_model"),
        ("metadata", "projection_date"),
    ],
)
def test_a_projection_file_may_omit_descriptive_fields(tmp_path: Path, at: tuple[str, ...]) -> None:
    path = tmp_path / "1.json"
    path.write_text(json.dumps(without(projection(1), at)))
    assert TokenScores.read(path).layer == 1


def test_dynamics_are_recomputed_only_from_valid_projections(tmp_path: Path, evidence: Evidence) -> None:
    layout = Layout(tmp_path, "exp")
    raw = layout.residual("odd", "1")
    raw.parent.mkdir(parents=True)
    raw.touch()
    path = layout.projection(ODD, "residual", "odd", "1")

    def check(file: Damaged) -> None:
        file.put(path)
        report = run_project(layout, ["odd"], ProjectOptions(dynamics_only=True))
        if report.failures:
            assert len(report.failures) == 1
            check_refusal(report.failures[0], path)
            assert path.read_bytes() == file.data
            return
        before, after = content_of(file), read_json(path)
        assert are_scores(before)
        layer = before["metadata"]["vector_source"]["layer"]
        line = [row[layer][-1] for row in [*before["projections"]["prompt"], *before["projections"]["response"]]]
        velocity = [later - earlier for earlier, later in pairwise(line)]
        assert after["dynamics"]["velocity"] == pytest.approx(velocity, rel=1e-5, abs=1e-300)
        others = {k: v for k, v in read_json(file.put(path)).items() if k != "dynamics"}
        others["metadata"] = {**others["metadata"], "definitions": 2}
        assert {k: v for k, v in after.items() if k != "dynamics"} == others

    try_all(evidence, "projection file, --dynamics-only", damaged_json(projection(1)), check)


def test_damaged_attention_files_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    path = tmp_path / "1_attention.json"

    def check(file: Damaged) -> None:
        file.put(path)
        content = reads(path, lambda: read_json(path))
        if not isinstance(content, dict):
            return
        present = reads(path, lambda: read_attention(path).present_layers)
        entries = content["attention"] if present else []
        assert all(entries[0]["by_layer"][layer] is not None for layer in present or ())
        patterns = reads(path, lambda: read_attention(path).heads(1))
        if patterns is None:
            return
        n_tokens = len(content["tokens"])
        assert patterns.shape == (content["n_heads"], n_tokens, n_tokens)
        for token, entry in enumerate(content["attention"]):
            for head, weights in enumerate(entry["by_layer"][1]):
                assert all(is_number(weight) and 0 <= weight <= 1 for weight in weights)
                assert patterns[head, token, : token + 1].tolist() == pytest.approx(weights, abs=1e-6)

    try_all(evidence, "attention file", damaged_json(attention()), check)
    without_weights = [{**entry, "by_layer": [None] * N_LAYERS} for entry in attention()["attention"]]
    check(Damaged("wrong shapes", json.dumps({**attention(), "attention": without_weights}).encode()))
    for entry in ({"token_idx": 0, "by_layer": 5.0}, 5):  # by hand: a number in place of a list, or of an entry
        path.write_text(json.dumps({**attention(), "attention": [entry, *attention()["attention"][1:]]}))
        assert reads(path, lambda: read_attention(path).present_layers) is None
    path.write_text(json.dumps(attention()))
    assert read_attention(path).heads(1).shape[0] == N_HEADS


def test_damaged_logit_lens_files_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    path = tmp_path / "1_logit_lens.json"

    def check(file: Damaged) -> None:
        file.put(path)
        content = reads(path, lambda: read_json(path))
        if not isinstance(content, dict):
            return
        found = reads(path, lambda: read_lens(path).numbers())
        if found is None:
            return
        assert len(found.top_probs) == content["n_layers"] == len(content["predictions"][0]["by_layer"])
        for token, entry in enumerate(content["predictions"]):
            for layer, cell in enumerate(entry["by_layer"]):
                assert found.actual_rank[layer, token] == cell["actual_rank"] >= 1
                assert found.top_probs[layer, token].tolist() == [top["prob"] for top in cell["top_k"]]
                assert all(is_number(top["prob"]) and 0 <= top["prob"] <= 1 for top in cell["top_k"])

    try_all(evidence, "logit-lens file", damaged_json(logit_lens()), check)
    nested = {**logit_lens(), "predictions": [logit_lens()["predictions"]]}
    check(Damaged("wrong shapes", json.dumps(nested).encode()))
    path.write_text(json.dumps(logit_lens()))
    assert len(read_lens(path).numbers().top_probs) == N_LAYERS
