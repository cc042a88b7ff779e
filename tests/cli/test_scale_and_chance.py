"""The scale of projections and the chance level of what they show, from `extract` and `evaluate` to the summary."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests.cli.conftest import Run
from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.top_traits import show_top_traits
from tlcapture.commands.projecting import top_traits
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.explore.experiment_tables import rises_frame
from tlcapture.extraction.examples import read_examples
from tlcapture.extraction.prepared_examples import prepare_examples
from tlcapture.extraction.readout import read_out
from tlcapture.models.loading import load_model
from tlcapture.names import Trait
from tlcapture.runs.report import RunReport
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.storage.rounding import round_significant
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.statistics.critical_values import critical_score, critical_score_within
from tlcapture.traits.statistics.reference import read_reference

TRAITS = ("tone/loud", "tone/warm")


@pytest.fixture
def evaluated(data: Path, evaluated: Result) -> Layout:
    """An experiment with vectors of the residual stream that were evaluated, and their reference."""
    return Layout(data, "exp")


def vector_of(layout: Layout, trait: str, layer: int, method: str = "probe") -> torch.Tensor:
    value = torch.load(layout.vectors(Trait.parse(trait)) / f"{method}_layer{layer}.pt", weights_only=True)
    return value.double() / value.double().norm()


def files(layout: Layout, trait: str = "tone/loud") -> dict[str, Any]:
    folder = layout.projection(Trait.parse(trait), "residual", "short", "1").parent
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def test_calibrations_are_the_means_of_training_and_of_held_out_examples(evaluated: Layout, tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder), device="cpu", dtype="float32")
    trait = Trait.parse("tone/loud")
    prepared = prepare_examples(evaluated, model, read_examples(Datasets(evaluated.root), trait))
    activations = read_out(model, prepared.readings, ["residual"])["residual"]
    metadata = read_json(evaluated.vectors(trait) / "metadata.json")
    for name, chosen in (("calibration", ~prepared.held_out), ("held_out_calibration", prepared.held_out)):
        for method in ("probe", "mean_diff", "gradient"):
            for layer in range(3):
                scores = activations[layer].double() @ vector_of(evaluated, "tone/loud", layer, method)
                found = metadata[name][method][str(layer)]
                assert found["positive_mean"] == pytest.approx(float(scores[chosen & prepared.labels].mean()), abs=1e-4)
                assert found["negative_mean"] == pytest.approx(
                    float(scores[chosen & ~prepared.labels].mean()), abs=1e-4
                )
    means = torch.load(evaluated.vectors(trait) / "training_mean.pt", weights_only=True)
    assert torch.allclose(means, activations[:, ~prepared.held_out].mean(dim=1), atol=1e-5)


def test_the_reference_holds_the_means_of_prompts_and_responses(evaluated: Layout, tiny_folder: Path) -> None:
    found = read_reference(evaluated, "residual")
    assert found is not None
    assert len(found.prompts) >= 8
    assert found.fits(3, 32)
    assert "baseline/1" in found.prompts
    model = load_model(str(tiny_folder), device="cpu", dtype="float32")
    assert found.model_fingerprint == model.fingerprint
    assert read_reference(evaluated, "attn_out") is None


def test_a_second_evaluation_keeps_the_reference(evaluated: Layout, tlcapture: Run) -> None:
    path = evaluated.reference("residual")
    before = path.stat().st_mtime_ns
    assert tlcapture("evaluate", "--experiment", "exp", "--component", "residual").exit_code == 0
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"damaged")
    assert tlcapture("evaluate", "--experiment", "exp", "--component", "residual").exit_code == 0
    assert read_reference(evaluated, "residual") is not None


def test_projections_carry_calibration_definitions_and_chance(evaluated: Layout, capture: Run) -> None:
    assert capture("--max-new-tokens", 12).exit_code == 0
    for value in files(evaluated).values():
        source, chance = value["metadata"]["vector_source"], value["metadata"]["chance"]
        recorded = read_json(evaluated.vectors(Trait.parse("tone/loud")) / "metadata.json")
        at = recorded["calibration"][source["method"]][str(source["layer"])]
        held_out = recorded["held_out_calibration"][source["method"]][str(source["layer"])]
        assert source["calibration"] == {**at, "held_out": held_out}
        assert value["metadata"]["definitions"] == 2
        assert (chance["covariance"], chance["n_directions"], len(chance["rises"])) == ("reference", 200, 200)
        assert chance["reference_rises"]["sd"] > 0


def test_a_reference_that_is_made_or_removed_counts_in_the_next_capture(evaluated: Layout, capture: Run) -> None:
    reference = evaluated.reference("residual")
    kept = reference.read_bytes()
    for content, covariance in ((None, "isotropic"), (kept, "reference")):
        reference.unlink(missing_ok=True) if content is None else reference.write_bytes(content)
        assert capture("--overwrite", "--limit", "1").exit_code == 0
        assert {each["metadata"]["chance"]["covariance"] for each in files(evaluated).values()} == {covariance}


def test_capture_projects_at_the_selected_layer(evaluated: Layout, capture: Run) -> None:
    result = capture()
    assert "by default" not in result.stderr
    best = read_json(evaluated.evaluation)["best_vectors"]["tone/loud"]
    source = files(evaluated)["1"]["metadata"]["vector_source"]
    assert (source["layer"], source["method"], source["selected_by"]) == (best["layer"], best["method"], "effect_size")


def test_a_centred_projection_is_of_the_difference_from_the_training_mean(
    evaluated: Layout, capture: Run, tlcapture: Run
) -> None:
    assert capture().exit_code == 0
    raw = files(evaluated)["2"]
    result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--centered")
    assert result.exit_code == 0, result.output
    assert "massive dimensions (none) carry of the variance: tone/loud 0%, tone/warm 0%" in result.output
    value = files(evaluated)["2"]
    source = value["metadata"]["vector_source"]
    means = torch.load(evaluated.vectors(Trait.parse("tone/loud")) / "training_mean.pt", weights_only=True)
    unit = vector_of(evaluated, "tone/loud", source["layer"], source["method"])
    activations = Capture.open(evaluated.residual("short", "2")).residual(source["layer"]).double()
    expected = (activations - means[source["layer"]].double()) @ unit
    found = [token[source["layer"]][-1] for part in ("prompt", "response") for token in value["projections"][part]]
    assert torch.allclose(torch.tensor(found).double(), expected, rtol=1e-4, atol=1e-4)
    offset = value["metadata"]["centered"]["offset"]
    assert offset == pytest.approx(float(means[source["layer"]].double() @ unit), rel=1e-4)
    before = raw["metadata"]["vector_source"]["calibration"]
    assert source["calibration"]["positive_mean"] == pytest.approx(before["positive_mean"] - offset, rel=1e-4)
    assert value["dynamics"]["commitment_point"] == raw["dynamics"]["commitment_point"]


def test_only_projections_that_are_centred_alike_are_kept(evaluated: Layout, capture: Run, tlcapture: Run) -> None:
    assert capture().exit_code == 0
    project = ("project", "--experiment", "exp", "--prompt-set", "short", "--skip-existing")
    for words, is_centred in (((), False), (("--centered",), True), (("--centered",), True), ((), False)):
        before = files(evaluated)["2"]
        result = tlcapture(*project, *words)
        assert result.exit_code == 0, result.output
        found = files(evaluated)["2"]
        assert ("centered" in found["metadata"]) == is_centred
        was_kept = ("centered" in before["metadata"]) == is_centred
        assert (f"{len(files(evaluated))} prompts skipped" in result.output) == was_kept, result.output


def test_without_a_training_mean_centred_names_the_command(evaluated: Layout, capture: Run, tlcapture: Run) -> None:
    assert capture("--no-project").exit_code == 0
    (evaluated.vectors(Trait.parse("tone/loud")) / "training_mean.pt").unlink()
    result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--centered")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()  # for all captures together
    assert "run 'tlcapture extract --experiment exp --traits tone/loud'" in line
    one = ("--traits", "tone/warm")
    assert tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--centered", *one).exit_code == 0


def test_dynamics_only_brings_an_earlier_file_to_the_present_definitions(
    evaluated: Layout, capture: Run, tlcapture: Run
) -> None:
    assert capture("--max-new-tokens", 20).exit_code == 0
    path = evaluated.projection(Trait.parse("tone/loud"), "residual", "short", "1")
    now = read_json(path)
    earlier = json.loads(json.dumps(now))
    del earlier["metadata"]["definitions"]
    earlier["dynamics"] |= {"commitment_point": 3, "persistence": 2}
    del earlier["dynamics"]["commitment_p"], earlier["dynamics"]["commitment_shift"]
    path.write_text(json.dumps(earlier))
    assert summary_of(evaluated, "short").tops  # it is read
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--dynamics-only")
    assert done.exit_code == 0
    found = read_json(path)
    assert found["metadata"]["definitions"] == 2
    assert "chance" not in found["metadata"]  # it was of other statistics
    for name in ("commitment_point", "commitment_p", "persistence"):
        assert found["dynamics"][name] == pytest.approx(now["dynamics"][name], abs=1e-3)


def put_rises(layout: Layout, own: dict[str, list[float]], random: dict[str, np.ndarray]) -> None:
    """Projections of prompts with given rises, the random ones `[n_prompts, 200]` by trait: over the reference, too."""
    for trait, rises in own.items():
        for number, rise in enumerate(rises):
            path = layout.projection(Trait.parse(trait), "residual", "short", str(number + 1))
            chance = {
                "n_directions": 200, "directions": "same", "commit": 10, "persist": 30, "commitment": 0.01,
                "persistence": 0.5, "rises": random[trait][number].tolist(),
                "reference_rises": {"mean": 0.0, "sd": 1.0}, "standardised_rises": random[trait][number].tolist(),
            }  # fmt: skip
            value = {
                "prompt": {"tokens": ["a", "b"]},
                "response": {"tokens": ["c", "d"], "text": "cd"},
                "projections": {"prompt": [[[9.0]], [[1.0]]], "response": [[[1.0 + rise]], [[1.0 + rise]]]},
                "dynamics": {"commitment_point": 3, "persistence": None},
                "metadata": {"vector_source": {"layer": 0}, "definitions": 2, "chance": chance},
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))


def test_a_trait_is_shown_only_where_it_beats_the_largest_of_random_directions(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    generator = np.random.default_rng(0)
    own = {"tone/loud": [5.0, 1.0, 0.0, 0.2, 0.4], "tone/warm": [0.0, 0.3, 0.1, 0.0, 0.2]}
    random = {trait: generator.standard_normal((5, 200)) for trait in own}
    put_rises(layout, own, random)
    summary = summary_of(layout, "short")

    def standard(values: np.ndarray) -> np.ndarray:
        return (values - values.mean(axis=0)) / values.std(axis=0)

    largest = np.max([standard(random[trait]) for trait in own], axis=0)
    for row, top in enumerate(summary.tops):
        assert top.rise == pytest.approx(max(standard(np.array(values))[row] for values in own.values()))
        assert top.chance == pytest.approx(max(np.sort(largest[row])[-10], critical_score_within(2, 5)))
        assert top.stands_out == (top.rise > top.chance)
    assert [top.commitment_point for top in summary.tops] == [3] * 5
    findings = summary.findings
    assert findings is not None
    assert (findings.n_projections, findings.commit, findings.clearly_commit) == (10, 10, 10)
    assert (findings.persist, findings.clearly_persist) == (0, 0)
    assert (findings.random_commit, findings.random_persist) == (0.05, 0.15)


def test_the_summary_says_how_many_findings_chance_alone_would_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(tmp_path, "exp")
    put_rises(layout, {"tone/loud": [5.0] * 10}, {"tone/loud": np.zeros((10, 200))})
    show_top_traits(Console(), layout, "short", "residual", RunReport(layout.folder))
    shown = capsys.readouterr().out
    assert "a trait stands out in 0 of 10 prompts; up to 0.5 expected by chance\n" in shown
    assert "of 10 projections, 100 % commit and 0 % persist; of random directions, 5 % and 15 %\n" in shown
    assert "more clearly than 95 % of random directions: 10 commit, 0 persist; 0.5 of each expected by chance" in shown


@pytest.mark.parametrize("n_prompts", [1, 3, 4, 5])
def test_a_trait_that_rises_far_stands_out_however_few_prompts_there_are(tmp_path: Path, n_prompts: int) -> None:
    layout, generator = Layout(tmp_path, "exp"), np.random.default_rng(0)
    own = {f"tone/t{number}": generator.standard_normal(n_prompts).tolist() for number in range(10)}
    own["tone/t0"][0] += 20
    put_rises(layout, own, {trait: generator.standard_normal((n_prompts, 200)) for trait in own})
    summary = summary_of(layout, "short")
    assert summary.is_against_set == (n_prompts >= 5)
    assert (summary.tops[0].trait, summary.tops[0].stands_out) == ("tone/t0", True)


def test_random_traits_seldom_stand_out(tmp_path: Path) -> None:
    layout, generator = Layout(tmp_path, "exp"), np.random.default_rng(1)
    traits = [f"tone/t{number}" for number in range(10)]
    own = {trait: generator.standard_normal(60).tolist() for trait in traits}
    put_rises(layout, own, {trait: generator.standard_normal((60, 200)) for trait in traits})
    tops = summary_of(layout, "short").tops
    assert len(tops) == 60
    assert sum(top.stands_out for top in tops) <= 8  # 3 are expected; more than 8 in 0.3 % of runs


def test_a_rise_as_far_as_that_of_ordinary_prompts_does_not_stand_out(tmp_path: Path) -> None:
    """Random directions may rise less than vectors on the same prompt: 10 % of prompts had one that stood out."""
    layout, generator = Layout(tmp_path, "exp"), np.random.default_rng(0)
    traits = [f"tone/t{number}" for number in range(10)]
    for far, stands_out in ((2.5, False), (2.7, True)):
        own = {trait: [far, 0.1] for trait in traits}
        put_rises(layout, own, {trait: generator.normal(0, 0.5, (2, 200)) for trait in traits})
        top = summary_of(layout, "short").tops[0]
        assert (top.stands_out, top.chance) == (stands_out, pytest.approx(2.569, abs=0.01))


def test_a_trait_without_a_chance_level_leaves_that_of_the_others_known(tmp_path: Path) -> None:
    layout, generator = Layout(tmp_path, "exp"), np.random.default_rng(0)
    own = {"tone/loud": [4.0], "tone/warm": [0.5], "tone/imported": [9.0]}
    put_rises(layout, own, {trait: generator.standard_normal((1, 200)) for trait in own})
    path = layout.projection(Trait.parse("tone/imported"), "residual", "short", "1")
    value = read_json(path)
    value["metadata"]["chance"] |= {"reference_rises": None, "standardised_rises": None}
    path.write_text(json.dumps(value))
    (top,) = summary_of(layout, "short").tops
    assert (top.trait, top.stands_out, [*top.rises], [*top.unmeasured]) == (
        "tone/loud", True, ["tone/loud", "tone/warm"], ["tone/imported"],
    )  # fmt: skip
    frame = rises_frame(layout, "short", "residual").set_index("trait")
    assert frame.stands_out.to_dict() == {"tone/imported": False, "tone/loud": True, "tone/warm": False}
    assert frame.chance.isna().to_dict() == {"tone/imported": True, "tone/loud": False, "tone/warm": False}


@pytest.mark.parametrize(("kept", "processes"), [((), 0), (("--layers", "0,2"), 0), (("--layers", "0,2"), 1)])
def test_the_summary_of_a_run_reads_no_file_that_the_run_wrote(
    evaluated: Layout, capture: Run, monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...], processes: int
) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", str(processes))
    shown, read = [], []
    summarise, read_file = top_traits.summary_of, ProjectionFile.read

    def summary(layout: Layout, *args: Any) -> Any:
        monkeypatch.setattr(ProjectionFile, "read", read.append)
        shown.append(summarise(layout, *args))
        monkeypatch.setattr(ProjectionFile, "read", read_file)
        return shown[-1]

    monkeypatch.setattr(top_traits, "summary_of", summary)
    capture(*kept, "--layer", "2")
    assert not read
    assert shown[0].tops
    assert shown == [summarise(evaluated, "short")]  # the same as from the files


def test_equal_prompts_do_not_stand_out_by_rounding(tmp_path: Path) -> None:
    layout, rise = Layout(tmp_path, "exp"), 0.1
    own = {"tone/loud": [*[rise] * 4, rise * (1 + 1e-6)]}
    put_rises(layout, own, {"tone/loud": np.full((5, 200), rise)})
    assert [(top.rise, top.stands_out) for top in summary_of(layout, "short").tops] == [(0.0, False)] * 5


def test_a_trait_whose_random_directions_are_its_own_does_not_stand_out(tmp_path: Path) -> None:
    """With a hidden width of 1 there is one direction and its opposite, and files keep their rises with 4 digits."""
    layout, rises = Layout(tmp_path, "exp"), np.array([12.34549, -1.23456, 2.34561, 4.6541, 0.98765])
    signs = np.where(np.arange(200) % 2, 1.0, -1.0)
    put_rises(layout, {"tone/loud": rises.tolist()}, {"tone/loud": round_significant(np.outer(rises, signs), 4)})
    assert not any(top.stands_out for top in summary_of(layout, "short").tops)


def test_the_summary_says_where_random_directions_have_no_reference(
    data: Path, extract: Run, capture: Run, tlcapture: Run, tiny_folder: Path
) -> None:
    said = "without a reference, random directions are isotropic"
    assert extract("--component", "residual").exit_code == 0
    assert said in capture().output
    evaluated = tlcapture("evaluate", "--experiment", "exp", "--component", "residual", "--model", tiny_folder)
    assert evaluated.exit_code == 0
    result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    assert result.exit_code == 0
    assert said not in result.output


def test_where_the_reference_came_later_projecting_again_is_enough(
    evaluated: Layout, capture: Run, tlcapture: Run
) -> None:
    reference = read_reference(evaluated, "residual")
    assert reference is not None
    evaluated.reference("residual").unlink()
    without = capture("--limit", 1).output
    assert "is unknown: run 'tlcapture evaluate" in without
    reference.write(evaluated, "residual")
    later = capture("--limit", 1, "--skip-existing").output
    assert "is unknown: run 'tlcapture project" in later
    assert tlcapture("project", "--experiment", "exp", "--all-prompt-sets").exit_code == 0
    assert "unknown" not in capture("--limit", 1, "--skip-existing").output


def test_a_reference_of_other_weights_is_a_warning(evaluated: Layout, capture: Run, tlcapture: Run) -> None:
    assert "other weights" not in capture().stderr
    reference = read_reference(evaluated, "residual")
    assert reference is not None
    replace(reference, model_fingerprint="0123").write(evaluated, "residual")
    result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    assert result.stderr.count("prompts of experiment 'exp' ran on other weights than these captures") == 1


def test_a_single_prompt_is_compared_with_the_reference(evaluated: Layout, capture: Run, data: Path) -> None:
    result = capture(prompts=("--prompt", "hello there"))
    assert re.search(r"adhoc: the trait that rose most( at layer \d)?, against the reference prompts", result.output)
    assert "less the mean rise of the reference prompts" in result.output
    (top,) = summary_of(evaluated, "adhoc").tops
    path = evaluated.projection(Trait.parse(top.trait), "residual", "adhoc", "1")
    value = read_json(path)
    source, reference = value["metadata"]["vector_source"], read_reference(evaluated, "residual")
    assert reference is not None
    unit = vector_of(evaluated, top.trait, source["layer"], source["method"])
    over = (reference.response_means - reference.prompt_means)[source["layer"]].double() @ unit
    scores = {
        part: [token[source["layer"]][-1] for token in value["projections"][part]] for part in ("prompt", "response")
    }
    rise = np.mean(scores["response"]) - np.mean(scores["prompt"][1:])
    assert top.rise == pytest.approx((rise - float(over.mean())) / float(over.std()), rel=1e-3)
    assert top.chance is not None
    if not top.stands_out:
        assert "none stands out" in result.output
    projection = Experiment("exp", evaluated.root).captures["adhoc"].at(0).project(top.trait, layer=source["layer"])
    assert projection.rise == pytest.approx(top.rise, rel=1e-3)
    standard = read_json(path)["metadata"]["chance"]["standardised_rises"]
    assert projection.chance is not None
    of_prompts = projection.chance.widening * critical_score(1, len(reference.prompts))
    assert projection.chance.largest_rise == pytest.approx(max(np.sort(standard)[-10], of_prompts), rel=1e-3)
    assert top.chance >= of_prompts


def test_without_a_chance_level_the_summary_says_that_it_is_unknown(evaluated: Layout, capture: Run) -> None:
    assert capture().exit_code == 0
    for trait in TRAITS:
        for prompt_id, value in files(evaluated, trait).items():
            del value["metadata"]["chance"]
            evaluated.projection(Trait.parse(trait), "residual", "short", prompt_id).write_text(json.dumps(value))
    assert all(top.chance is None and not top.stands_out for top in summary_of(evaluated, "short").tops)
