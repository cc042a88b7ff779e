"""`tlcapture capture`: each option and the files that it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tests.faults.commands import contents
from tlcapture.captures.capture import Capture
from tlcapture.errors import NoSpaceError
from tlcapture.models.engines import hooked
from tlcapture.storage.files import read_json

Run = Callable[..., Result]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def tokens_of(raw: Path) -> dict[str, list[int]]:
    return {path.stem: Capture.open(path).token_ids for path in raw.glob("*.pt")}


def test_a_raw_file_has_exactly_the_documented_form(capture: Run, raw: Path) -> None:
    result = capture()
    assert result.exit_code == 0, result.output
    assert "wrote 3 files" in result.output
    assert names(raw) == ["1.pt", "2.pt", "3.pt"]
    value = torch.load(raw / "1.pt", weights_only=True, mmap=True)
    assert set(value) == {"format_version", "prompt", "response", "metadata", "spans"}
    assert value["format_version"] == 1
    for part in ("prompt", "response"):
        assert set(value[part]) == {"text", "tokens", "token_ids", "activations"}
        count = len(value[part]["tokens"])
        assert count == len(value[part]["token_ids"])
        assert list(value[part]["activations"]) == [0, 1, 2]
        for layer in range(3):
            points = value[part]["activations"][layer]
            assert list(points) == ["residual_in", "after_attn", "residual_out"]
            assert all(tensor.shape == (count, 32) for tensor in points.values())
            assert all(tensor.dtype == torch.float16 for tensor in points.values())
            if layer:
                before = value[part]["activations"][layer - 1]["residual_out"]
                assert points["residual_in"].data_ptr() == before.data_ptr()
    metadata = value["metadata"]
    assert {
        "inference_model", "inference_experiment", "prompt_set", "prompt_id", "n_layers", "d_model", "engine", "dtype",
        "temperature", "seed", "max_new_tokens", "stop_reason", "system_prompt", "chat_template", "model_fingerprint",
        "weight_processing", "capture_date", "tlcapture_version",
    } <= set(metadata)  # fmt: skip
    assert (metadata["prompt_set"], metadata["prompt_id"], metadata["n_layers"]) == ("short", "1", 3)
    assert (metadata["temperature"], metadata["seed"], metadata["weight_processing"]) == (0.7, 0, "none")
    assert metadata["bos"] == {"count": 1, "by": "chat template"}
    assert metadata["model_revision"] is None
    assert metadata["layer_convention"].startswith("layer L is block L, counted from 0")
    assert metadata["hooks"] == {
        "residual_in": "blocks.{L}.hook_resid_pre",
        "after_attn": "blocks.{L}.hook_resid_mid",
        "residual_out": "blocks.{L}.hook_resid_post",
    }
    # One buffer of 2 * n_layers + 1 points per part, and little else.
    n_tokens = sum(len(value[part]["tokens"]) for part in ("prompt", "response"))
    assert (raw / "1.pt").stat().st_size < 7 * n_tokens * 32 * 2 + 12_000


def test_the_experiments_model_is_recorded_and_cannot_be_changed_by_accident(
    capture: Run, tlcapture: Run, data: Path, tiny_folder: Path, raw: Path
) -> None:
    capture()
    config = read_json(data / "experiments" / "exp" / "config.json")
    assert config == {
        "extraction_model": None,
        "inference_model": str(tiny_folder),
        "use_chat_template": None,
        "system_prompt": None,
    }
    again = tlcapture("capture", "--experiment", "exp", "--prompt-set", "other", "--max-new-tokens", 2)
    assert again.exit_code == 0
    before = tokens_of(raw)
    refused = tlcapture("capture", "--experiment", "exp", "--prompt-set", "short", "--model", "smollm2")
    assert refused.exit_code == 2
    assert "--allow-model-change" in refused.stderr
    assert tokens_of(raw) == before


def test_allow_model_change_switches_to_the_other_model(capture: Run, data: Path, tiny_folder: Path) -> None:
    config = data / "experiments" / "exp" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"inference_model": "some-other-model"}))
    assert capture().exit_code == 2
    assert capture("--allow-model-change").exit_code == 0
    assert read_json(config)["inference_model"] == str(tiny_folder)


@pytest.mark.parametrize("name", ["short,other", "other,short"])
def test_several_prompt_sets_and_all_of_them(capture: Run, data: Path, name: str) -> None:
    assert capture(prompts=("--prompt-set", name)).exit_code == 0
    assert names(data / "experiments" / "exp" / "inference" / "raw" / "residual") == ["other", "short"]


def test_all_prompt_sets_includes_the_shipped_ones(capture: Run, data: Path) -> None:
    result = capture("--limit", 1, "--max-new-tokens", 1, prompts=("--all-prompt-sets",))
    folders = names(data / "experiments" / "exp" / "inference" / "raw" / "residual")
    assert {"short", "other", "single_trait", "baseline"} <= set(folders)
    # The tiny model has a short context: prompts that do not fit fail, the others are captured.
    assert result.exit_code in (0, 1)


def test_a_single_prompt_is_prompt_1_of_adhoc(capture: Run, data: Path) -> None:
    result = capture(prompts=("--prompt", "what is rain?"))
    assert result.exit_code == 0
    found = Capture.open(data / "experiments" / "exp" / "inference" / "raw" / "residual" / "adhoc" / "1.pt")
    assert "what is rain?" in found.prompt.text


def test_attention_and_logit_lens_files(capture: Run, raw: Path, analysis: Path) -> None:
    assert capture("--attention", "--logit-lens").exit_code == 0
    assert names(analysis) == [f"{n}_{kind}.json" for n in (1, 2, 3) for kind in ("attention", "logit_lens")]
    for number in ("1", "2", "3"):
        saved = Capture.open(raw / f"{number}.pt")
        attention = read_json(analysis / f"{number}_attention.json")
        assert list(attention) == [
            "prompt_id", "prompt_set", "n_layers", "n_heads", "tokens", "n_prompt_tokens", "n_response_tokens",
            "attention",
        ]  # fmt: skip
        assert attention["tokens"] == saved.tokens
        assert len(attention["attention"]) == len(saved.tokens)
        lens = read_json(analysis / f"{number}_logit_lens.json")
        assert lens["top_k"] == 50
        assert len(lens["predictions"]) == len(saved.tokens) - 1


def close(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal, with a tolerance for numbers."""
    if isinstance(ours, float) or isinstance(theirs, float):
        return abs(ours - theirs) <= tolerance
    if isinstance(ours, dict):
        return set(ours) == set(theirs) and all(close(ours[key], theirs[key], tolerance) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def test_a_replayed_file_equals_the_one_written_live(capture: Run, raw: Path, analysis: Path) -> None:
    add_ons = ("--attention", "--logit-lens", "--layer-internals", 1)
    assert capture(*add_ons, "--save-dtype", "float32").exit_code == 0
    internals = raw.parents[1] / "internals" / "short" / "2_L1.pt"
    live = {name: read_json(analysis / name) for name in names(analysis)}
    live_internals = torch.load(internals, weights_only=True)
    written = {path: path.stat().st_mtime_ns for path in raw.glob("*")}
    for path in analysis.glob("*"):
        path.unlink()
    internals.unlink()
    assert capture(*add_ons, "--replay").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in raw.glob("*")} == written
    for name, value in live.items():
        replayed = read_json(analysis / name)
        if name.endswith("attention.json"):
            assert close(replayed, value, 1e-3)
            continue
        for ours, theirs in zip(replayed["predictions"], value["predictions"], strict=True):
            for row, live_row in zip(ours["by_layer"], theirs["by_layer"], strict=True):
                assert row["actual_prob"] == pytest.approx(live_row["actual_prob"], rel=1e-2, abs=1e-5)
                probs = [[entry["prob"] for entry in each["top_k"]] for each in (row, live_row)]
                assert probs[0] == pytest.approx(probs[1], rel=1e-2, abs=1e-5)
    replayed_internals = torch.load(internals, weights_only=True)
    assert replayed_internals["tokens"] == live_internals["tokens"]
    for key, tensor in live_internals.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.allclose(replayed_internals[key], tensor, atol=1e-4), key


def test_replay_needs_a_saved_capture_and_generates_nothing(capture: Run, raw: Path, tiny_folder: Path) -> None:
    result = capture("--replay", "--attention")
    assert result.exit_code == 1
    command = f"tlcapture capture --experiment exp --prompt-set short --model {tiny_folder} --skip-existing"
    failures = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert failures == [f"failed: short: --replay needs saved captures, and 3 of 3 are missing: run '{command}' first"]
    assert not raw.exists()


def test_replay_with_another_model_is_refused(capture: Run, raw: Path) -> None:
    capture()
    value = torch.load(raw / "1.pt", weights_only=True)
    value["metadata"]["model_fingerprint"] = "another"
    torch.save(value, raw / "1.pt")
    result = capture("--replay", "--attention")
    assert result.exit_code == 1
    assert "short/1: captured from" in result.stderr
    assert "failed: short/2" not in result.stderr


def test_kept_captures_with_other_sampling_settings_are_reported(capture: Run, tlcapture: Run, raw: Path) -> None:
    assert capture("--temperature", 0, "--limit", 2).exit_code == 0
    again = capture("--temperature", 0, "--seed", 7, "--skip-existing", "--limit", 2)
    assert "made with another" not in again.stderr  # a greedy run has no seed
    other = capture("--temperature", 1.5, "--skip-existing")
    assert other.exit_code == 0
    message = "short: kept 2 captures made with another temperature, seed, sampling or --max-new-tokens: leave out"
    assert other.stderr.count(message) == 1
    one = capture("--temperature", 0, "--max-new-tokens", 6, "--skip-existing")
    assert "short: kept the capture of prompt 3 made with another temperature" in one.stderr


def test_a_stopped_run_that_captures_and_completes_goes_on_in_the_same_batches(
    capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcapture.commands.capturing import worker as capture_worker

    def stopping(*words: Any, **options: Any) -> Iterator[Any]:
        yield next(generate(*words, **options))
        raise NoSpaceError("the disk is full")

    def noting(model: Any, sequences: Any, *rest: Any) -> Iterator[Any]:
        read.append([prompt.name for prompts in sequences.values() for prompt in prompts])
        return replayed(model, sequences, *rest)

    read: list[list[Any]] = []
    generate, replayed = capture_worker.generate_or_force, capture_worker.replayed
    assert capture("--limit", 1).exit_code == 0
    more = ("--skip-existing", "--attention")
    monkeypatch.setattr(capture_worker, "replayed", noting)
    with monkeypatch.context() as patch:
        patch.setattr(capture_worker, "generate_or_force", stopping)
        assert capture(*more).exit_code == 1
    assert capture(*more).exit_code == 0
    assert read == [["1"]]  # as without the stop; beside the captures of the first run it would round differently
    assert len([*data.glob("experiments/exp/analysis/per_token/short/*_attention.json")]) == 3


def test_kept_captures_that_are_stored_in_another_dtype_are_reported(capture: Run, raw: Path) -> None:
    assert capture("--temperature", 0, "--limit", 2, "--save-dtype", "float32").exit_code == 0
    message = "short: kept 2 captures stored in another dtype than --save-dtype float16: leave out --skip-existing"
    same = ("--temperature", 0, "--limit", 2, "--skip-existing")
    assert message in capture(*same, "--save-dtype", "float16").stderr
    assert "stored in" not in capture(*same, "--save-dtype", "float32").stderr
    assert "stored in" not in capture(*same).stderr


def test_captures_that_are_kept_beside_those_of_another_dtype_are_reported(capture: Run, raw: Path) -> None:
    message = "kept 2 captures computed in another dtype or on another engine: leave out"
    assert capture("--limit", 2).exit_code == 0
    other = capture("--dtype", "bfloat16", "--skip-existing")
    assert other.exit_code == 0
    assert message in other.stderr
    assert message not in capture("--skip-existing", "--limit", 2).stderr


def test_a_retrained_model_under_the_same_name_is_not_mixed_in(capture: Run, raw: Path) -> None:
    assert capture("--limit", 2).exit_code == 0
    for number in (1, 2):
        value = torch.load(raw / f"{number}.pt", weights_only=True)
        value["metadata"]["model_fingerprint"] = "before"
        torch.save(value, raw / f"{number}.pt")
    mixed = capture("--skip-existing")
    assert mixed.exit_code == 1
    assert "beside 2 captures of a model of the same name with other weights" in mixed.stderr


@pytest.mark.parametrize("kind", [(), ("--projections-only", "--method", "probe")])
def test_a_new_capture_of_a_set_that_was_stopped_goes_on_without_mixing_settings(
    capture: Run, extract: Run, data: Path, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, ...]
) -> None:
    from tlcapture.commands.capturing import worker as capture_worker

    def stopping(*words: Any, **options: Any) -> Iterator[Any]:
        yield next(original(*words, **options))
        raise NoSpaceError("the disk is full")

    def undated() -> dict[str, Any]:
        found = contents(data / "experiments" / "exp")
        for value in (each for each in found.values() if isinstance(each, dict)):
            value.get("metadata", {}).get("capture", {}).pop("capture_date", None)
        return found

    original, prompts = capture_worker.generate_or_force, ("--prompt-set", "short,other")
    extract()
    words = (*kind, "--batch-size", 1)
    assert capture(*words, "--seed", 5, prompts=prompts).exit_code == 0
    expected = undated()
    for path in (data / "experiments" / "exp").glob("[ai]n*"):
        shutil.rmtree(path)
    assert capture(*words, "--attention", prompts=prompts).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(capture_worker, "generate_or_force", stopping)
        assert capture(*words, "--seed", 5, prompts=prompts).exit_code == 1
    resumed = capture(*words, "--seed", 5, "--skip-existing", prompts=prompts)
    assert resumed.exit_code == 0, resumed.stderr
    assert undated() == expected
    assert "1 prompt skipped" in resumed.stdout


def test_removed_files_of_an_earlier_capture_are_reported(capture: Run, raw: Path) -> None:
    first = capture("--attention", "--layer-internals", 1, "--limit", 2, "--temperature", 0)
    assert "runs removed" not in first.stdout
    alike = capture("--limit", 2, "--temperature", 0)
    assert "runs removed" not in alike.stdout
    other = capture("--attention", "--limit", 1, "--temperature", 3, "--seed", 1)
    assert "1 file of earlier runs removed and not written again" in other.stdout
    assert [path.name for path in (raw.parents[1] / "internals" / "short").glob("*.pt")] == ["2_L1.pt"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", 2**64), ("--seed", -(2**63) - 1), ("--limit", 2**31), ("--batch-size", 2**31), ("--limit", 10**30)],
)
def test_numbers_out_of_range_are_refused(capture: Run, raw: Path, option: str, value: int) -> None:
    result = capture(option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert not raw.exists()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_reported_once_and_does_not_stop_the_run(capture: Run, raw: Path) -> None:
    result = capture("--log-file", "/dev/full")
    assert result.exit_code == 0
    assert result.stderr.count("--log-file /dev/full: can no longer be written: No space left on device") == 1
    assert "Logging error" not in result.stderr
    assert len(list(raw.glob("*.pt"))) == 3


def test_internals_with_nan_or_inf_are_refused(capture: Run, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float16 overflow before a ReLU need not be visible after it."""
    from tlcapture.commands.prompt_files import outputs

    view = outputs.internals_view

    def overflown(cache: Any, layer: int, positions: Any) -> Any:
        found = view(cache, layer, positions)
        found["blocks.1.mlp.hook_pre"][0, 0] = -torch.inf
        return found

    monkeypatch.setattr(outputs, "internals_view", overflown)
    result = capture("--layer-internals", 1, "--limit", 1)
    assert result.exit_code == 1
    assert "short/1: blocks.1.mlp.hook_pre holds NaN or inf: interventions that are too strong" in result.stderr
    assert "run 'tlcapture doctor --model /" in result.stderr
    assert not list((raw.parents[1] / "internals").rglob("*.pt"))


def test_layer_internals_can_be_repeated(capture: Run, raw: Path) -> None:
    assert capture("--layer-internals", 0, "--layer-internals", 2, "--limit", 1).exit_code == 0
    folder = raw.parents[1] / "internals" / "short"
    assert names(folder) == ["1_L0.pt", "1_L2.pt"]
    value = torch.load(folder / "1_L2.pt", weights_only=True)
    n_tokens = len(value["tokens"])
    assert value["blocks.2.attn.hook_q"].shape == (n_tokens, 4, 8)
    assert value["blocks.2.attn.hook_k"].shape == (n_tokens, 2, 8)
    assert value["blocks.2.attn.hook_pattern"].shape == (4, n_tokens, n_tokens)
    assert value["blocks.2.mlp.hook_post"].shape == (n_tokens, 64)
    assert 0 < value["n_prompt_tokens"] < n_tokens
    assert value["metadata"]["prompt_id"] == "1"
    saved = Capture.open(raw / "1.pt")
    assert value["token_ids"] == saved.token_ids
    assert torch.allclose(value["blocks.2.hook_resid_post"], saved.residual(2), rtol=1e-2, atol=1e-2)


# Every dtype, and the one that is chosen for each that the model computes in, also where it is replayed.
@pytest.mark.parametrize(
    ("dtype", "words", "compute"),
    [
        ("auto", (), "float32"),
        ("auto", ("--replay",), "float32"),
        ("auto", (), "bfloat16"),
        ("float32", (), "bfloat16"),
        ("float16", ("--replay",), "float32"),
        ("bfloat16", (), "float32"),
    ],
)
def test_internals_follow_the_save_dtype(
    capture: Run, raw: Path, dtype: str, words: tuple[str, ...], compute: str
) -> None:
    runs = ("--dtype", compute, "--device", "cpu", "--limit", 1)
    assert capture(*runs).exit_code == 0
    assert capture(*runs, "--layer-internals", 1, "--save-dtype", dtype, *words).exit_code == 0
    value = torch.load(raw.parents[1] / "internals" / "short" / "1_L1.pt", weights_only=True)
    floats = {key: each for key, each in value.items() if isinstance(each, torch.Tensor)}
    assert len(floats) > 8
    expected = {"float32": "float16", "bfloat16": "bfloat16"}[compute] if dtype == "auto" else dtype
    assert {each.dtype for each in floats.values()} == {getattr(torch, expected)}


def test_all_internals_imply_attention_and_logit_lens(capture: Run, raw: Path, analysis: Path) -> None:
    assert capture("--layer-internals", "all", "--limit", 1).exit_code == 0
    assert names(raw.parents[1] / "internals" / "short") == ["1_L0.pt", "1_L1.pt", "1_L2.pt"]
    assert names(analysis) == ["1_attention.json", "1_logit_lens.json"]


def test_a_layer_that_the_model_does_not_have_is_refused(capture: Run, raw: Path) -> None:
    result = capture("--layer-internals", 9)
    assert result.exit_code == 2
    assert "--layer-internals 9: the model has layers 0 to 2" in result.stderr
    assert not raw.exists()


def test_capture_attn_keeps_attention_outputs(capture: Run, raw: Path) -> None:
    assert capture("--capture-attn", "--save-dtype", "float32").exit_code == 0
    found = Capture.open(raw / "1.pt")
    for layer in range(3):
        expected = found.residual(layer, "residual_in") + found.residual(layer, "attn_out")
        assert torch.allclose(found.residual(layer, "after_attn"), expected, atol=1e-5)


def test_captures_are_projected_at_the_default_layer_unless_told_not_to(
    capture: Run, extract: Run, projected: Path
) -> None:
    assert extract().exit_code == 0
    assert capture("--no-project").exit_code == 0
    assert not projected.exists()
    result = capture()
    assert result.exit_code == 0
    assert result.stderr.count("layer 1 by default (the model has no layer 16)") == 1
    assert "'tlcapture evaluate --experiment exp' would choose one" in result.stderr
    assert names(projected) == ["1.json", "2.json", "3.json"]
    assert read_json(projected / "1.json")["metadata"]["vector_source"]["selected_by"] == "fallback"
    assert "the trait that rose most" in result.output


def test_layer_and_method_choose_the_vector(capture: Run, extract: Run, projected: Path) -> None:
    extract()
    assert capture("--layer", 2, "--method", "mean_diff").exit_code == 0
    source = read_json(projected / "1.json")["metadata"]["vector_source"]
    assert (source["layer"], source["method"], source["selected_by"]) == (2, "mean_diff", "override")
    result = capture("--layer", 7)
    assert result.exit_code == 2
    assert "--layer 7: there are vectors of layers 0 to 2" in result.stderr
    evaluation = projected.parents[4] / "extraction" / "extraction_evaluation.json"
    row = {"trait": "tone/loud", "method": "gradient", "layer": 0, "component": "residual", "val_effect_size": 3.0}
    evaluation.write_text(json.dumps({"all_results": [row]}))
    assert capture("--layer", "auto").exit_code == 0
    source = read_json(projected / "1.json")["metadata"]["vector_source"]
    assert (source["layer"], source["method"], source["selected_by"]) == (0, "gradient", "effect_size")


def test_vectors_can_come_from_another_experiment(capture: Run, extract: Run, projected: Path) -> None:
    extract(experiment="vectors")
    result = capture("--vector-experiment", "vectors")
    assert result.exit_code == 0
    assert "run 'tlcapture evaluate --experiment vectors', then " in result.output
    assert "'tlcapture project --experiment exp --all-prompt-sets --vector-experiment vectors'" in result.output
    assert read_json(projected / "1.json")["metadata"]["vector_source"]["experiment"] == "vectors"
    result = capture("--vector-experiment", "nothing")
    assert result.exit_code == 2
    assert "no experiment 'nothing': expected the folder " in result.stderr


def test_length_temperature_and_seed_change_the_response(capture: Run, raw: Path) -> None:
    def ids(*words: object) -> dict[str, list[int]]:
        assert capture(*words).exit_code == 0
        return tokens_of(raw)

    sampled = ids("--temperature", 2)
    assert ids("--temperature", 2, "--seed", 0) == sampled
    assert ids("--temperature", 2, "--seed", 1) != sampled
    greedy = ids("--temperature", 0)
    assert ids("--temperature", 0, "--seed", 1) == greedy
    longer = ids("--temperature", 0, "--max-new-tokens", 9)
    assert all(longer[name][: len(greedy[name])] == greedy[name] for name in greedy)
    assert Capture.open(raw / "1.pt").metadata["max_new_tokens"] == 9


@pytest.mark.parametrize("size", ["1", "2", "auto"])
def test_the_batch_size_does_not_change_tokens(capture: Run, raw: Path, size: str) -> None:
    assert capture("--batch-size", 3).exit_code == 0
    expected = tokens_of(raw)
    assert capture("--batch-size", size).exit_code == 0
    assert tokens_of(raw) == expected


def test_limit_takes_the_first_prompts(capture: Run, raw: Path) -> None:
    assert capture("--limit", 2).exit_code == 0
    assert names(raw) == ["1.pt", "2.pt"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_save_dtype_and_dtype(capture: Run, raw: Path, dtype: str) -> None:
    assert capture("--save-dtype", dtype, "--dtype", "bfloat16", "--device", "cpu").exit_code == 0
    found = Capture.open(raw / "1.pt")
    assert found.residual(0).dtype == getattr(torch, dtype)
    assert found.metadata["dtype"] == "bfloat16"


@pytest.mark.parametrize("engine", [*tiny.ENGINES, "auto"])
def test_engines_write_the_same_tokens(capture: Run, raw: Path, engine: str) -> None:
    result = capture("--engine", engine, "--temperature", 0)
    assert result.exit_code == 0
    assert f"on engine {tiny.ENGINES[0] if engine == 'auto' else engine}" in result.output
    found = tokens_of(raw)
    capture("--temperature", 0)
    assert tokens_of(raw) == found


def test_chat_template_and_system_prompt_options(capture: Run, raw: Path) -> None:
    capture("--system-prompt", "be kind")
    found = Capture.open(raw / "1.pt")
    assert "<turn>system\nbe kind</turn>" in found.prompt.text
    assert found.metadata["system_prompt"] == "be kind"
    capture("--no-chat-template")
    found = Capture.open(raw / "1.pt")
    assert found.prompt.text == "hello there"
    assert found.metadata["chat_template"] is False
    assert found.prompt.tokens[0] == "<bos>"


def test_the_experiments_config_sets_template_and_system_prompt(
    capture: Run, data: Path, raw: Path, tiny_folder: Path
) -> None:
    config = data / "experiments" / "exp" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"use_chat_template": False, "system_prompt": "from config"}))
    assert capture().exit_code == 0
    assert Capture.open(raw / "1.pt").prompt.text == "from config\n\nhello there"
    assert read_json(config)["system_prompt"] == "from config"
    assert capture("--chat-template", "--system-prompt", "option").exit_code == 0
    assert "<turn>system\noption" in Capture.open(raw / "1.pt").prompt.text


def test_skip_existing_makes_exactly_what_is_missing(
    capture: Run, extract: Run, raw: Path, analysis: Path, projected: Path
) -> None:
    extract()
    capture("--attention")
    kept = {path: path.stat().st_mtime_ns for folder in (raw, analysis, projected) for path in folder.glob("*")}
    for path in (raw / "2.pt", analysis / "3_attention.json", projected / "1.json"):
        path.unlink()
        del kept[path]
    for path in (analysis / "2_attention.json", projected / "2.json"):
        del kept[path]  # those of prompt 2, which is captured again
    tokens = tokens_of(raw)
    result = capture("--attention", "--skip-existing")
    assert result.exit_code == 0
    assert names(raw) == ["1.pt", "2.pt", "3.pt"]
    assert names(analysis) == ["1_attention.json", "2_attention.json", "3_attention.json"]
    assert names(projected) == ["1.json", "2.json", "3.json"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {name: ids for name, ids in tokens_of(raw).items() if name in tokens} == tokens
    nothing = capture("--attention", "--skip-existing")
    assert "wrote 0 files" in nothing.output
    assert "loading" not in nothing.output
    assert "3 prompts skipped: nothing was missing" in nothing.output


def test_skip_existing_adds_views_to_saved_captures_without_generating(capture: Run, raw: Path, analysis: Path) -> None:
    capture()
    before = {path: path.stat().st_mtime_ns for path in raw.glob("*")}
    result = capture("--skip-existing", "--logit-lens")
    assert {path: path.stat().st_mtime_ns for path in raw.glob("*")} == before
    assert len(names(analysis)) == 3
    assert "new tokens" not in result.output


def test_an_edited_prompt_is_captured_again(capture: Run, data: Path, raw: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    capture()
    before = {path.name: path.stat().st_mtime_ns for path in raw.glob("*")}
    make_prompt_set(data, "short", ["hello there", "what else?", "<b>tell me & more</b>"])
    assert capture("--skip-existing").exit_code == 0
    changed = {path.name for path in raw.glob("*") if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"2.pt"}
    assert "what else?" in Capture.open(raw / "2.pt").prompt.text


def test_another_system_prompt_or_a_shortened_text_is_captured_again(capture: Run, data: Path, raw: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    capture("--limit", 1)
    assert "wrote 0 files" in capture("--limit", 1, "--skip-existing").output
    assert "wrote 1 file" in capture("--limit", 1, "--skip-existing", "--system-prompt", "be rude").output
    assert "wrote 1 file" in capture("--limit", 1, "--skip-existing", "--no-chat-template").output
    make_prompt_set(data, "short", ["hello"])
    capture("--skip-existing")
    assert Capture.open(raw / "1.pt").metadata["prompt_text"] == "hello"


def test_views_of_another_model_are_removed_even_if_the_tokens_are_the_same(
    capture: Run, tlcapture: Run, tmp_path: Path, raw: Path, analysis: Path
) -> None:
    capture("--attention", "--max-new-tokens", 0)
    other = tmp_path / "other"
    tiny.hf_model("qwen2").save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    common = ("--experiment", "exp", "--prompt-set", "short", "--max-new-tokens", 0)
    assert tlcapture("capture", *common, "--model", other, "--allow-model-change").exit_code == 0
    assert names(raw) == ["1.pt", "2.pt", "3.pt"]
    assert names(analysis) == []


def test_float16_captures_are_of_the_same_checkpoint(capture: Run, raw: Path) -> None:
    capture()
    mark = Capture.open(raw / "1.pt").metadata["model_fingerprint"]
    for dtype in ("float16", "bfloat16"):
        capture("--dtype", dtype)
        assert Capture.open(raw / "1.pt").metadata["model_fingerprint"] == mark


@tiny.needs_hooked
def test_out_of_memory_in_replay_fails_only_its_prompt(
    capture: Run, raw: Path, analysis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcapture.models.engines.hooked import HookedModel

    capture()
    original, shortest = HookedModel.step, len(Capture.open(raw / "2.pt").tokens)

    def step(self: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        if len(tokens) > 1 or tokens.shape[1] == shortest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens, *args, **options)

    monkeypatch.setattr(HookedModel, "step", step)
    result = capture("--replay", "--attention")
    assert result.exit_code == 1
    assert "failed: short/2: out of memory" in result.stderr
    assert names(analysis) == ["1_attention.json", "3_attention.json"]


def test_a_damaged_capture_is_captured_again_with_overwrite(capture: Run, raw: Path) -> None:
    capture()
    expected = tokens_of(raw)
    (raw / "2.pt").write_bytes((raw / "2.pt").read_bytes()[:500])
    assert capture("--skip-existing").exit_code == 1
    assert (raw / "2.pt").stat().st_size == 500
    assert capture("--skip-existing", "--overwrite").exit_code == 0
    assert tokens_of(raw) == expected


def test_files_derived_from_other_tokens_are_removed(
    capture: Run, extract: Run, raw: Path, analysis: Path, projected: Path
) -> None:
    extract()
    capture("--attention", "--temperature", 2, "--seed", 1)
    capture("--no-project", "--temperature", 2, "--seed", 1)  # the same tokens: all files are kept
    assert len(names(analysis)) == len(names(projected)) == 3
    capture("--no-project", "--temperature", 2, "--seed", 2)
    assert names(analysis) == []
    assert names(projected) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of --prompt-set NAME, --prompt TEXT (or --prompt-file FILE) and --all-prompt-sets"),
        (("--prompt-set", "short", "--prompt", "x"), "give one of"),
        (("--prompt-set", "nix"), "no prompt set 'nix'"),
        (("--prompt-set", "../short"), "not a safe file name"),
        (("--prompt", "  "), "text is empty"),
        (("--prompt", "x", "--layer", "best"), "neither a layer number nor 'auto'"),
        (("--prompt", "x", "--batch-size", "0"), "neither a number of at least 1 nor 'auto'"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("--prompt", "x", "--engine", "steam"), "engine"),
        (("--prompt", "x", "--model", "."), "it has no config.json"),
        (("--prompt", "x", "--temperature", "nan"), "temperature nan: expected a number of at least 0"),
        (
            ("--prompt", "x", "--replay", "--capture-attn"),
            "--replay does not change raw residuals: leave it out to capture attention outputs",
        ),
    ],
)
def test_wrong_usage_has_an_error_of_one_line_and_exit_status_2(
    tlcapture: Run, data: Path, words: tuple[str, ...], message: str
) -> None:
    result = tlcapture("capture", "--experiment", "exp", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (data / "experiments").exists()


def folder_of(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_a_checkpoint_with_missing_weights_is_refused(tlcapture: Run, root: Path, tiny_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of(root, tiny_folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = tlcapture("capture", "--experiment", "exp", "--prompt", "x", "--model", folder)
    assert result.exit_code == 2
    assert "is incomplete: its checkpoint has no fitting model.layers.1.mlp.up_proj.weight" in result.stderr


def test_a_truncated_checkpoint_has_an_error_of_one_line(tlcapture: Run, root: Path, tiny_folder: Path) -> None:
    folder = folder_of(root, tiny_folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    result = tlcapture("capture", "--experiment", "exp", "--prompt", "x", "--model", folder)
    assert result.exit_code == 2
    assert "cannot be loaded" in result.stderr
    assert not (root / "experiments").exists()


def test_a_chat_template_that_refuses_has_an_error_of_one_line(tlcapture: Run, root: Path, tiny_folder: Path) -> None:
    folder = folder_of(root, tiny_folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only on sundays') }}")
    result = tlcapture("capture", "--experiment", "exp", "--prompt", "x", "--model", folder)
    assert result.exit_code == 2
    assert "chat template refuses the prompt (only on sundays): use --no-chat-template" in result.stderr
    assert not (root / "experiments").exists()


def test_a_system_prompt_that_is_not_unicode_is_refused(capture: Run) -> None:
    result = capture("--system-prompt", "bad \udcff byte")
    assert result.exit_code == 2
    assert "not valid Unicode" in result.stderr


def test_a_single_token_has_a_lens_without_predictions(capture: Run, analysis: Path, data: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    make_prompt_set(data, "short", ["<eos>"])
    assert capture("--max-new-tokens", 0, "--no-chat-template", "--logit-lens", "--attention").exit_code == 0
    lens = read_json(analysis / "1_logit_lens.json")
    assert len(lens["predictions"]) == len(lens["tokens"]) - 1 == 1  # BOS and one token


def test_stray_folders_and_files_are_ignored(capture: Run, tlcapture: Run, extract: Run, raw: Path) -> None:
    extract()
    capture()
    for name in (".ipynb_checkpoints", "-x"):
        (raw.parent / name).mkdir()
        (raw.parent / name / "1.pt").touch()
        (raw / name).mkdir()
    result = tlcapture("project", "--experiment", "exp", "--all-prompt-sets")
    assert result.exit_code == 0, result.output


def test_an_experiment_name_cannot_leave_its_folder(tlcapture: Run, data: Path) -> None:
    for name in ("../x", "/etc/x", "a/b", "..", "-x"):
        result = tlcapture("capture", f"--experiment={name}", "--prompt", "x")
        assert result.exit_code == 2
        assert "not a safe file name" in result.stderr


def test_a_prompt_that_does_not_fit_fails_and_the_others_are_captured(capture: Run, data: Path, raw: Path) -> None:
    from tests.cli.conftest import make_prompt_set

    make_prompt_set(data, "short", ["fine", "x" * 400, "fine too"])
    result = capture()
    assert result.exit_code == 1
    assert "short/2: does not fit: " in result.stderr
    assert names(raw) == ["1.pt", "3.pt"]


def test_activations_too_large_for_float16_are_saved_in_bfloat16_or_refused(
    capture: Run, tlcapture: Run, raw: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    import transformers

    loud = tmp_path / "loud"
    shutil.copytree(tiny_folder, loud)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3e5)
    model.save_pretrained(loud)
    common = ("capture", "--experiment", "exp", "--prompt-set", "short", "--max-new-tokens", 2, "--model", loud)
    assert tlcapture(*common).exit_code == 0
    assert Capture.open(raw / "1.pt").residual(0).dtype == torch.bfloat16
    result = tlcapture(*common, "--save-dtype", "float16")
    assert result.exit_code == 1
    assert "does not fit float16" in result.stderr
    assert Capture.open(raw / "1.pt").residual(0).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ((), True),
        (("--no-project", "--attention"), False),
        (("--projections-only",), False),
        (("--tokens", "last"), False),
    ],
)
def test_processes_are_started_only_if_they_will_have_work(
    capture: Run, extract: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], starts: bool
) -> None:
    from tlcapture.runs.processes import Processes

    called: list[object] = []
    call = Processes.call

    def noting(self: Processes, *args: object) -> object:
        called.append(args)
        return call(self, *args)

    announced: list[int] = []
    monkeypatch.setattr(Processes, "call", noting)
    monkeypatch.setattr(Processes, "announce", lambda self, n_prompts: announced.append(n_prompts))
    extract()
    assert capture(*words).exit_code == 0
    assert bool(announced) == bool(called) == starts


class NoProcess:
    """In place of another process: what it is asked to call is called in this one."""

    is_usable = is_ending = is_starting = False

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def end_soon(self) -> None:
        pass

    def end(self) -> None:
        pass


@tiny.needs_hooked
def test_a_small_model_leaves_a_processor_to_the_process_beside_it(
    capture: Run, extract: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLCAPTURE_PROCESSES", "1")
    monkeypatch.setattr("tlcapture.runs.processes._Process", NoProcess)
    monkeypatch.setattr("tlcapture.runs.processes.n_processors", lambda: 2)
    assert extract().exit_code == 0
    seen, step = set(), hooked.HookedModel.step

    def watched(self: Any, *args: Any, **how: Any) -> Any:
        seen.add(torch.get_num_threads())
        return step(self, *args, **how)

    monkeypatch.setattr(hooked.HookedModel, "step", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert capture().exit_code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}
