"""`tlcapture project` and `tlcapture extract`: each option once, and the files it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tests.cli.conftest import make_trait
from tlcapture.captures.capture import Capture
from tlcapture.commands.projecting import top_traits
from tlcapture.storage.files import read_json

Run = Callable[..., Result]


@pytest.fixture
def project(tlcapture: Run, extract: Run, capture: Run, data: Path, once: Callable[..., Result]) -> Run:
    """`tlcapture project` in an experiment with vectors and captures of `short` and `other`."""

    def extract_and_capture(*options: str) -> Result:
        assert extract().exit_code == 0
        return capture(*options, prompts=("--prompt-set", "short,other"))

    made = once(data / "experiments" / "exp", ("--no-project", "--capture-attn"), extract_and_capture)
    assert made.exit_code == 0

    def run(*words: object, prompts: tuple[object, ...] = ("--prompt-set", "short")) -> Result:
        return tlcapture("project", "--experiment", "exp", *prompts, *words)

    return run


@pytest.fixture
def vectors(data: Path) -> Path:
    return data / "experiments" / "exp" / "extraction" / "tone" / "loud" / "vectors"


def test_vectors_and_metadata_have_the_documented_form(extract: Run, vectors: Path, tiny_folder: Path) -> None:
    result = extract()
    assert result.exit_code == 0, result.output
    expected = {
        f"{p}{m}_layer{n}.pt" for p in ("", "attn_out_") for m in ("probe", "mean_diff", "gradient") for n in range(3)
    }
    kept = {f"{prefix}{name}" for prefix in ("", "attn_out_") for name in ("metadata.json", "training_mean.pt")}
    assert {path.name for path in vectors.iterdir()} == expected | kept
    vector = torch.load(vectors / "probe_layer1.pt", weights_only=True)
    assert vector.shape == (32,)
    assert vector.dtype == torch.float32
    metadata = read_json(vectors / "metadata.json")
    stated = {
        "extraction_model": str(tiny_folder),
        "extraction_experiment": "exp",
        "trait": "tone/loud",
        "component": "residual",
        "methods": ["probe", "mean_diff", "gradient"],
        "layers": [0, 1, 2],
        "num_layers": 3,
        "hidden_dim": 32,
        "hook": "blocks.{L}.hook_resid_post",
        "position": "response_mean",
        "dtype": "float32",
        "weight_processing": "none",
        "engine": tiny.ENGINES[0],
        "model_revision": None,
        "layer_convention": "layer L is block L, counted from 0: residual_out of layer 0 is the first block's output",
        "chat_template": True,
        "bos": {"count": 1, "by": "chat template"},
    }
    assert {key: metadata[key] for key in stated} == stated
    assert metadata["timestamp"]
    assert metadata["model_fingerprint"]
    assert len(metadata["split"]["held_out_pairs"]) == 2
    assert read_json(vectors / "attn_out_metadata.json")["hook"] == "blocks.{L}.hook_attn_out"


def test_methods_layers_and_component_narrow_the_extraction(extract: Run, vectors: Path) -> None:
    assert extract("--methods", "mean_diff", "--layers", "0,2", "--component", "residual").exit_code == 0
    assert {path.name for path in vectors.iterdir()} == {
        "mean_diff_layer0.pt", "mean_diff_layer2.pt", "metadata.json", "training_mean.pt"
    }  # fmt: skip
    assert extract("--methods", "probe", "--layers", "1", "--component", "residual").exit_code == 0
    metadata = read_json(vectors / "metadata.json")
    assert (metadata["methods"], metadata["layers"]) == (["probe", "mean_diff"], [0, 1, 2])
    assert {method: list(found) for method, found in metadata["calibration"].items()} == {
        "mean_diff": ["0", "2"],
        "probe": ["1"],
    }


def test_prompts_without_responses_are_answered_by_the_model(extract: Run, data: Path, vectors: Path) -> None:
    folder = data / "datasets" / "traits" / "tone" / "loud"
    for side in ("positive", "negative"):
        rows = [{"pair": str(n), "prompt": f"{side} question {n}"} for n in range(6)]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert extract("--methods", "mean_diff", "--component", "residual").exit_code == 0
    first = torch.load(vectors / "mean_diff_layer1.pt", weights_only=True)
    assert extract("--methods", "mean_diff", "--component", "residual").exit_code == 0
    assert torch.allclose(torch.load(vectors / "mean_diff_layer1.pt", weights_only=True), first, atol=1e-4)


def test_the_position_is_chosen_and_recorded(extract: Run, vectors: Path) -> None:
    extract("--methods", "mean_diff", "--component", "residual", "--layers", 1)
    mean = torch.load(vectors / "mean_diff_layer1.pt", weights_only=True)
    words = ("--methods", "mean_diff", "--component", "residual", "--layers", 1, "--position", "all_mean")
    assert extract(*words).exit_code == 0
    assert read_json(vectors / "metadata.json")["position"] == "all_mean"
    assert not torch.allclose(torch.load(vectors / "mean_diff_layer1.pt", weights_only=True), mean, atol=1e-3)


def test_vectors_of_another_split_are_removed_with_their_metadata(extract: Run, vectors: Path) -> None:
    extract("--methods", "mean_diff", "--component", "residual", "--seed", 1)
    extract("--methods", "probe", "--component", "residual", "--seed", 2)
    assert read_json(vectors / "metadata.json")["methods"] == ["probe"]
    assert not list(vectors.glob("mean_diff*"))


def test_batch_size_changes_no_vector(extract: Run, vectors: Path) -> None:
    extract("--batch-size", 1, "--methods", "mean_diff")
    alone = torch.load(vectors / "mean_diff_layer2.pt", weights_only=True)
    extract("--batch-size", 7, "--methods", "mean_diff", "--engine", "auto", "--device", "cpu", "--dtype", "float32")
    assert torch.allclose(torch.load(vectors / "mean_diff_layer2.pt", weights_only=True), alone, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--traits", "loud"), "not of the form category/name"),
        (("--traits", "tone/quiet"), "no examples for trait 'tone/quiet'"),
        (("--methods", "magic"), "no method 'magic': choose among probe, mean_diff, gradient"),
        (("--layers", "5"), "--layers 5: the model has layers 0 to 2"),
        (("--layers", "x"), "not a list of layer numbers"),
    ],
)
def test_wrong_usage_of_extract(extract: Run, data: Path, words: tuple[str, ...], said: str) -> None:
    result = extract(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (data / "experiments").exists()


def test_a_projection_file_has_the_documented_form(project: Run, projected: Path, tiny_folder: Path) -> None:
    result = project()
    assert result.exit_code == 0, result.output
    value = read_json(projected / "2.json")
    raw = Capture.open(projected.parents[3] / "raw" / "residual" / "short" / "2.pt")
    assert list(value) == ["prompt", "response", "projections", "dynamics", "metadata", "spans"]
    for part, captured in (("prompt", raw.prompt), ("response", raw.response)):
        assert value[part] == {"text": captured.text, "tokens": captured.tokens, "n_tokens": len(captured.tokens)}
        assert torch.tensor(value["projections"][part]).shape == (len(captured.tokens), 3, 3)
    assert list(value["dynamics"]) == [
        "commitment_point", "commitment_shift", "commitment_p", "peak_velocity", "persistence", "velocity",
        "acceleration", "by_span",
    ]  # fmt: skip
    n_tokens = len(raw.tokens)
    assert len(value["dynamics"]["velocity"]) == n_tokens - 1
    metadata = value["metadata"]
    assert metadata["sublayers"] == ["residual_in", "after_attn", "residual_out"]
    source = metadata["vector_source"]
    assert metadata["definitions"] == 2
    origin, calibration = source.pop("origin"), source.pop("calibration")
    recorded = read_json(projected.parents[4] / "extraction" / "tone" / "loud" / "vectors" / "metadata.json")
    assert calibration == recorded["calibration"]["probe"]["1"]
    assert origin == {key: recorded[key] for key in origin}
    assert {"hook", "position", "model_fingerprint", "model_revision", "engine", "dtype", "bos"} <= origin.keys()
    assert source == {
        "model": str(tiny_folder),
        "experiment": "exp",
        "trait": "tone/loud",
        "method": "probe",
        "layer": 1,
        "component": "residual",
        "selected_by": "fallback",
        "score": None,
    }
    vector = torch.load(
        projected.parents[4] / "extraction" / "tone" / "loud" / "vectors" / "probe_layer1.pt", weights_only=True
    )
    expected = raw.residual(1).float() @ (vector / vector.norm())
    found = [token[1][2] for part in ("prompt", "response") for token in value["projections"][part]]
    assert torch.allclose(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)
    assert "warnings" not in metadata


def test_the_root_may_be_given(project: Run, tlcapture: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLCAPTURE_ROOT")
    words = ("project", "--experiment", "exp", "--prompt-set", "short")
    assert tlcapture(*words).exit_code == 2
    assert tlcapture(*words, "--root", data).exit_code == 0


def test_all_prompt_sets_are_those_with_captures(project: Run, projected: Path) -> None:
    assert project(prompts=("--all-prompt-sets",)).exit_code == 0
    assert [path.name for path in sorted(projected.parent.iterdir())] == ["other", "short"]


def test_traits_layer_and_method(project: Run, projected: Path) -> None:
    assert project("--traits", "tone/loud", "--layer", 0, "--method", "gradient").exit_code == 0
    source = read_json(projected / "1.json")["metadata"]["vector_source"]
    assert (source["layer"], source["method"], source["selected_by"]) == (0, "gradient", "override")
    assert not (projected.parents[2] / "warm").exists()
    result = project("--traits", "tone/quiet")
    assert result.exit_code == 2
    assert "available traits: tone/loud, tone/warm" in result.stderr


def test_captures_without_attn_out_fail_together(capture: Run, extract: Run, tlcapture: Run) -> None:
    extract()
    capture("--no-project")
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--component", "attn_out")
    assert done.exit_code == 1
    reason = "3 of 3 captures hold no attn_out (1, 2, 3): capture again with --capture-attn"
    assert [line for line in done.stderr.splitlines() if "attn_out" in line] == [f"failed: short: {reason}"]


def test_attn_out_is_written_to_its_own_folder_with_one_score_per_layer(project: Run, projected: Path) -> None:
    assert project("--component", "attn_out").exit_code == 0
    assert not projected.exists()
    value = read_json(projected.parents[1] / "attn_stream" / "short" / "1.json")
    assert torch.tensor(value["projections"]["prompt"]).shape[1:] == (3, 1)
    assert value["metadata"]["sublayers"] == ["attn_out"]


def test_dynamics_only_changes_nothing_but_dynamics(project: Run, projected: Path, vectors: Path) -> None:
    project()
    path = projected / "1.json"
    before = read_json(path)
    path.write_text(json.dumps({**before, "dynamics": {}}))
    for vector in vectors.glob("*.pt"):
        vector.unlink()  # neither vectors nor raw activations are read
    assert project("--dynamics-only").exit_code == 0
    after = read_json(path)
    assert {key: value for key, value in after.items() if key != "dynamics"} == {
        key: value for key, value in before.items() if key != "dynamics"
    }
    for key in ("commitment_point", "persistence"):
        assert after["dynamics"][key] == before["dynamics"][key]
    assert after["dynamics"]["velocity"] == pytest.approx(before["dynamics"]["velocity"], abs=1e-4)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"metadata": {"vector_source": {"layer": "x"}}}', "{"])
def test_a_damaged_projection_is_named_by_dynamics_only(project: Run, projected: Path, content: str) -> None:
    project()
    (projected / "1.json").write_text(content)
    result = project("--dynamics-only")
    assert result.exit_code == 1
    assert "short/1: " in result.stderr
    assert "1.json" in result.stderr
    assert (projected / "1.json").read_text() == content


def test_skip_existing_projects_only_what_is_missing(project: Run, projected: Path) -> None:
    project()
    kept = {path: path.stat().st_mtime_ns for path in projected.glob("*") if path.name != "2.json"}
    (projected / "2.json").unlink()
    result = project("--skip-existing")
    assert "wrote 1 file" in result.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (projected / "2.json").exists()


def test_what_is_projected_later_has_the_numbers_that_it_has_beside_the_other_traits(
    project: Run, projected: Path
) -> None:
    def numbers() -> dict[str, Any]:
        contents = {path.name: read_json(path) for path in warm.glob("*.json")}
        return {name: [content["projections"], content["dynamics"]] for name, content in contents.items()}

    project()
    warm = Path(str(projected).replace("loud", "warm"))
    before = numbers()
    for name in before:
        (warm / name).unlink()
    project("--skip-existing")
    assert numbers() == before


def test_a_vector_of_another_model_is_a_warning_unless_it_is_intended(
    project: Run, extract: Run, projected: Path, vectors: Path
) -> None:
    metadata = read_json(vectors / "metadata.json")
    (vectors / "metadata.json").write_text(
        json.dumps({**metadata, "extraction_model": "elsewhere", "model_fingerprint": "0"})
    )
    result = project("--traits", "tone/loud")
    assert result.exit_code == 0
    assert "extracted from model 'elsewhere'" in result.stderr
    assert "elsewhere" in read_json(projected / "1.json")["metadata"]["warnings"][0]
    meant = project("--traits", "tone/loud", "--vector-experiment", "exp")
    assert "elsewhere" not in meant.stderr
    assert "warnings" not in read_json(projected / "1.json")["metadata"]


def test_a_vector_that_cannot_match_fails_its_trait_alone(project: Run, projected: Path, vectors: Path) -> None:
    metadata = read_json(vectors / "metadata.json")
    (vectors / "metadata.json").write_text(json.dumps({**metadata, "weight_processing": "fold_ln"}))
    result = project()
    assert result.exit_code == 1
    assert result.stderr.count("failed: tone/loud: the probe vector of tone/loud at layer 1") == 1
    assert "has weight_processing 'fold_ln'" in result.stderr
    assert not projected.exists()
    assert len(list((projected.parents[2] / "warm" / "residual_stream" / "short").iterdir())) == 3


def test_a_difference_is_reported_once_for_all_traits_and_captures(capture: Run, project: Run, projected: Path) -> None:
    project()
    capture("--no-chat-template", "--no-project", "--dtype", "bfloat16")
    result = project()
    assert result.exit_code == 0
    engine = tiny.ENGINES[0]
    rounding = f"the vector was extracted on {engine} in float32, the capture made on {engine} in bfloat16"
    template = "the vector was extracted with a chat template, the capture made without a chat template"
    for text in (rounding, template):
        assert result.stderr.count(text) == 1
        assert f"tone/loud, tone/warm: {text}" in result.stderr
    said = read_json(projected / "3.json")["metadata"]["warnings"]
    assert [line.startswith("tone/loud: the vector was extracted") for line in said] == [True, True]


def test_vectors_of_unknown_origin_are_projected_with_a_warning(project: Run, projected: Path, vectors: Path) -> None:
    (vectors / "metadata.json").unlink()
    result = project("--traits", "tone/loud")
    assert result.exit_code == 0
    assert "their origin is unknown" in result.stderr
    assert read_json(projected / "1.json")["metadata"]["vector_source"]["model"] is None


def test_a_vector_of_another_width_fails_its_trait_alone(project: Run, projected: Path, vectors: Path) -> None:
    torch.save(torch.ones(9), vectors / "probe_layer1.pt")
    result = project()
    assert result.exit_code == 1
    said = "probe_layer1.pt: the vector has width 9, but metadata.json gives 32"
    assert said in result.stderr
    assert not projected.exists()
    assert len(list((projected.parents[2] / "warm" / "residual_stream" / "short").iterdir())) == 3


def test_skip_existing_projects_again_for_another_layer_and_a_newer_vector(
    project: Run, projected: Path, vectors: Path
) -> None:
    project("--traits", "tone/loud")
    assert "wrote 0 files" in project("--traits", "tone/loud", "--skip-existing").output
    assert "wrote 3 files" in project("--traits", "tone/loud", "--skip-existing", "--layer", 2).output
    torch.save(torch.randn(32), vectors / "probe_layer2.pt")
    assert "wrote 3 files" in project("--traits", "tone/loud", "--skip-existing", "--layer", 2).output


def test_vectors_of_another_tool_are_kept_by_an_extraction(extract: Run, vectors: Path) -> None:
    vectors.mkdir(parents=True)
    for name in ("probe_layer1.pt", "pca_layer2.pt"):
        torch.save(torch.ones(32), vectors / name)
    assert extract("--methods", "mean_diff", "--layers", 0).exit_code == 0
    assert extract("--methods", "mean_diff", "--layers", 0, "--seed", 3).exit_code == 0
    assert {"probe_layer1.pt", "pca_layer2.pt", "mean_diff_layer0.pt"} <= {path.name for path in vectors.iterdir()}


def test_a_failed_extraction_leaves_earlier_vectors_as_they_were(
    extract: Run, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract()
    before = {path: path.read_bytes() for path in vectors.iterdir()}
    monkeypatch.setitem(
        __import__("tlcapture.extraction.methods", fromlist=["FITS"]).FITS,
        "gradient",
        lambda activations, labels, seed: torch.full((3, 32), float("nan")),
    )
    result = extract("--seed", 5)
    assert result.exit_code == 1
    assert "failed: tone/loud: gradient gave a vector that is zero or contains NaN or inf" in result.stderr
    assert "next:" not in result.output, "there is nothing new to go on with"
    assert {path: path.read_bytes() for path in vectors.iterdir()} == before


def test_edited_examples_do_not_mix_with_earlier_vectors(extract: Run, data: Path, vectors: Path) -> None:
    extract("--methods", "mean_diff", "--component", "residual")
    file = data / "datasets" / "traits" / "tone" / "loud" / "positive.jsonl"
    file.write_text(file.read_text().replace("LOUD", "NOISY"))
    extract("--methods", "probe", "--component", "residual")
    assert read_json(vectors / "metadata.json")["methods"] == ["probe"]
    assert not list(vectors.glob("mean_diff*"))


def test_capture_takes_the_model_that_was_extracted_from(
    extract: Run, tlcapture: Run, data: Path, tiny_folder: Path
) -> None:
    extract()
    result = tlcapture("capture", "--experiment", "exp", "--prompt", "hi", "--max-new-tokens", 1)
    assert result.exit_code == 0
    assert read_json(data / "experiments" / "exp" / "config.json")["inference_model"] == str(tiny_folder)
    again = tlcapture(
        "capture", "--experiment", "exp", "--prompt", "hi", "--max-new-tokens", 1, "--model", f"{tiny_folder}/"
    )
    assert again.exit_code == 0


def test_a_file_that_is_not_a_capture_fails_alone(project: Run, projected: Path) -> None:
    raw = projected.parents[3] / "raw" / "residual" / "short"
    torch.save({"format_version": 1, "prompt": {}}, raw / "2.pt")
    torch.save({"format_version": 99}, raw / "3.pt")
    result = project()
    assert result.exit_code == 1
    assert "short/2: " in result.stderr
    assert "format version 99" in result.stderr
    assert [path.name for path in projected.glob("*")] == ["1.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--experiment", "exp", "--prompt-set", "short"), "no experiment 'exp'"),
        (("--experiment", "exp"), "give one of --prompt-set NAME and --all-prompt-sets"),
        (("--experiment", "exp", "--all-prompt-sets"), "no experiment 'exp'"),
    ],
)
def test_wrong_usage_of_project(tlcapture: Run, data: Path, words: tuple[str, ...], said: str) -> None:
    result = tlcapture("project", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_prompt_set_without_captures_lists_those_with(project: Run) -> None:
    result = project(prompts=("--prompt-set", "nix"))
    assert result.exit_code == 2
    assert "captured sets: other, short" in result.stderr


def test_a_method_or_layer_without_vectors_is_an_error_before_any_prompt_runs(
    capture: Run, extract: Run, raw: Path
) -> None:
    assert extract("--methods", "probe,mean_diff", "--layers", "0,2").exit_code == 0
    for words, said in (
        (("--layer", 99), "--layer 99: there are vectors of layers 0, 2"),
        (("--method", "pca"), "--method pca: no trait has such vectors; methods: probe, mean_diff"),
    ):
        result = capture(*words)
        assert result.exit_code == 2
        assert said in result.stderr
        assert not raw.exists()


def test_a_failed_run_does_not_show_results_of_an_earlier_one(
    capture: Run, extract: Run, tlcapture: Run, raw: Path
) -> None:
    assert extract("--methods", "probe").exit_code == 0
    assert "rose most" in capture().stdout
    for path in raw.glob("*.pt"):
        path.write_bytes(b"damaged")
    failed = tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    assert failed.exit_code == 1
    assert "rose most" not in failed.stdout


def test_vectors_that_an_extraction_removes_are_counted(extract: Run) -> None:
    assert "removed" not in extract("--methods", "probe", "--component", "residual").stdout
    again = extract("--methods", "probe", "--component", "residual", "--layers", 1, "--seed", 3)
    assert "4 files of earlier runs removed and not written again" in again.stdout  # two layers of two traits


def test_a_component_without_vectors_is_an_error(capture: Run, extract: Run, tlcapture: Run) -> None:
    assert extract("--methods", "mean_diff", "--component", "residual").exit_code == 0
    capture("--capture-attn")
    done = tlcapture("project", "--experiment", "exp", "--prompt-set", "short", "--component", "attn_out")
    assert done.exit_code == 2
    assert done.output.startswith("error: no attn_out vectors in ")


def test_two_prompts_are_compared_with_themselves(capture: Run, extract: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_traits, "FEWEST_TO_COMPARE", 3)
    assert extract("--methods", "probe").exit_code == 0
    assert "against its own spread along the tokens" in capture("--limit", 2).stdout
    assert "against the other prompts of the set" in capture().stdout


def test_extract_takes_the_roots_own_traits_and_packaged_ones_when_asked(
    tlcapture: Run, data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trait(tmp_path / "package", "pack/age", "in", "out")
    monkeypatch.setattr(
        "tlcapture.storage.experiments.datasets.shipped_datasets", lambda: tmp_path / "package" / "datasets"
    )

    def extracted(experiment: str, *words: object) -> set[str]:
        quick = ("--methods", "mean_diff", "--layers", 1, "--component", "residual")
        done = tlcapture("extract", "--experiment", experiment, "--model", tiny_folder, *quick, *words)
        assert done.exit_code == 0, done.output
        folder = data / "experiments" / experiment / "extraction"
        return {path.parent.relative_to(folder).as_posix() for path in folder.rglob("vectors")}

    assert extracted("own") == {"tone/loud", "tone/warm"}
    assert extracted("all", "--traits", "all") == {"tone/loud", "tone/warm", "pack/age"}
    assert extracted("named", "--traits", "pack/age") == {"pack/age"}
    shutil.rmtree(data / "datasets" / "traits")
    assert extracted("none") == {"pack/age"}


def states(vectors: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in vectors.iterdir()}


def test_existing_vectors_are_skipped_without_loading_the_model(
    extract: Run, vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extract().exit_code == 0
    before = states(vectors)
    monkeypatch.setattr("tlcapture.models.loading.load_model", lambda *args, **options: pytest.fail("was loaded"))
    monkeypatch.setattr("tlcapture.models.loading.fetch_weights", lambda *args, **options: pytest.fail("was loaded"))
    for words in ((), ("--methods", "probe", "--component", "residual"), ("--layers", "1,2")):
        done = extract("--skip-existing", *words)
        assert done.exit_code == 0, done.output
        assert "tone/loud: its vectors exist, from these examples: skipped" in done.output
        assert states(vectors) == before


def test_with_skip_existing_only_what_is_missing_or_has_changed_is_extracted(
    extract: Run, vectors: Path, data: Path
) -> None:
    assert extract().exit_code == 0
    warm = vectors.parents[1] / "warm" / "vectors"
    made, kept = states(vectors), states(warm)

    def again(*words: object) -> set[str]:
        """The traits that a run with --skip-existing extracted again."""
        nonlocal made, kept
        done = extract("--skip-existing", *words)
        assert done.exit_code == 0, done.output
        changed = {"loud": states(vectors) != made, "warm": states(warm) != kept}
        made, kept = states(vectors), states(warm)
        return {name for name, has_changed in changed.items() if has_changed}

    assert again() == set()
    for dtype in ("bfloat16", "float32"):
        assert again("--dtype", dtype) == {"loud", "warm"}
        assert again("--dtype", dtype) == again() == set()
    (vectors / "attn_out_mean_diff_layer2.pt").unlink()
    assert again() == {"loud"}
    assert (vectors / "attn_out_mean_diff_layer2.pt").is_file()
    (warm / "metadata.json").unlink()
    assert again() == {"warm"}
    examples = data / "datasets" / "traits" / "tone" / "loud" / "positive.jsonl"
    lines = examples.read_text().splitlines()
    examples.write_text("\n".join([lines[0].replace("LOUD", "VERY LOUD"), *lines[1:]]) + "\n")
    assert again() == {"loud"}
    assert again("--seed", 1) == {"loud", "warm"}
    assert again("--seed", 1, "--position", "all_mean") == {"loud", "warm"}
    assert again("--seed", 1, "--position", "all_mean") == set()
    assert again("--seed", 1) == {"loud", "warm"}
    assert again("--seed", 1, "--position", "response_mean") == set()


def test_the_list_of_traits_names_those_whose_examples_have_changed(
    extract: Run, tlcapture: Run, vectors: Path, data: Path
) -> None:
    """What `extract --skip-existing` would extract again is the oracle."""
    folder = data / "datasets" / "traits" / "tone" / "loud"
    lines = (folder / "positive.jsonl").read_text().splitlines()
    edited = [lines[0].replace("LOUD", "VERY LOUD"), *lines[1:]]
    assert edited != lines

    def listed() -> list[str]:
        output = tlcapture("traits", "list", "--experiment", "exp").output
        return [line for line in output.splitlines() if "examples have changed" in line]

    assert extract().exit_code == 0
    assert listed() == []
    for changed in (edited, lines[1:], lines[::-1]):
        (folder / "positive.jsonl").write_text("\n".join(changed))
        assert listed() == [
            "tone/loud: the examples have changed since the vectors were extracted: "
            "run 'tlcapture extract --experiment exp --traits tone/loud'"
        ]
        assert "tone/loud: its vectors exist" not in extract("--skip-existing").output
        assert listed() == []
    (folder / "positive.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines[::-1]).encode())
    assert listed() == []  # the same examples
    assert "tone/loud: its vectors exist, from these examples: skipped" in extract("--skip-existing").output
    metadata = json.loads((vectors / "metadata.json").read_text())
    del metadata["examples_in_files"]  # as earlier versions wrote it
    (vectors / "metadata.json").write_text(json.dumps(metadata))
    assert listed() == []
    (folder / "positive.jsonl").write_text("\n".join(lines[1:]))
    assert len(listed()) == 1
    (folder / "positive.jsonl").write_text("{")
    assert listed() == []  # `traits check` says what is wrong


def test_one_layer_for_all_traits_is_said_below_the_table(project: Run) -> None:
    assert "all vectors are of layer 2" in project("--layer", 2).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layer", "45"), "--layer 45: there are vectors of layers 0 to 2"),
        (("--method", "prob"), "--method prob: no trait has such vectors: did you mean 'probe'? methods: "),
    ],
)
def test_a_layer_or_method_that_no_trait_has_is_one_error(
    project: Run, tlcapture: Run, projected: Path, words: tuple[str, ...], said: str
) -> None:
    for result in (project(*words), tlcapture("compare", "exp/short", "exp/other", "--no-kl", *words)):
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith(f"error: {said}")
        assert "next:" not in result.stdout
    assert not projected.exists()


def test_prompts_without_a_projection_to_recompute_are_one_failure(
    capture: Run, extract: Run, tlcapture: Run, projected: Path
) -> None:
    extract("--methods", "mean_diff", "--component", "residual", "--layers", "1")
    capture()
    (projected / "1.json").unlink()
    (projected / "3.json").unlink()
    words = ("project", "--experiment", "exp", "--prompt-set", "short", "--traits", "tone/loud")
    done = tlcapture(*words, "--dynamics-only")
    assert done.exit_code == 1 and "wrote 1 file" in done.stdout
    (failure,) = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert failure == (
        "failed: short: 2 of 3 prompts have no projection to recompute the dynamics of: run "
        "'tlcapture project --experiment exp --prompt-set short --traits tone/loud --skip-existing' first"
    )
    assert tlcapture(*words, "--skip-existing").exit_code == 0
    assert tlcapture(*words, "--dynamics-only").exit_code == 0
