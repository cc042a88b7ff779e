"""Variants of a model: captures with an adapter, and the tokens of other captures run through a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tests.cli.test_compare import TRAITS, compared, hidden_states, raw
from tests.test_adapters import needs_peft, write_adapter, zero_lora
from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.storage.files import read_json

Run = Callable[..., Result]
FULL = ("--save-dtype", "float32")


@pytest.fixture
def lora(tmp_path: Path, tiny_folder: Path) -> str:
    return write_adapter(tmp_path / "warm lora", str(tiny_folder))


@pytest.fixture
def zero(tmp_path: Path, tiny_folder: Path) -> str:
    return write_adapter(tmp_path / "zero", str(tiny_folder), zero_lora())


def merged_folder(tmp_path: Path, tiny_folder: Path, lora: str) -> Path:
    """The weights with the adapter, merged by peft itself."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    folder = tmp_path / "merged"
    peft.PeftModel.from_pretrained(base, lora).merge_and_unload().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@needs_peft
def test_captures_with_an_adapter_are_a_variant_and_equal_those_of_the_merged_weights(
    capture: Run, tlcapture: Run, data: Path, tmp_path: Path, tiny_folder: Path, lora: str
) -> None:
    assert capture().exit_code == 0
    before = raw(data, "exp").response.token_ids
    result = capture("--adapter", lora, *FULL)
    assert result.exit_code == 0, result.output
    assert f"with adapter {lora}" in result.output
    merged = ("--experiment", "merged", "--model", merged_folder(tmp_path, tiny_folder, lora), *FULL)
    assert tlcapture("capture", *merged, "--prompt-set", "short", "--max-new-tokens", 6).exit_code == 0
    for name in ("1", "2", "3"):
        ours, theirs = raw(data, "exp", name, "short@warm-lora"), raw(data, "merged", name)
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(ours.residual(2), theirs.residual(2), rtol=1e-5, atol=1e-5)
    metadata = raw(data, "exp", "1", "short@warm-lora").metadata
    assert (metadata["adapter"], metadata["variant"], metadata["inference_model"]) == (
        lora,
        "warm-lora",
        str(tiny_folder),
    )
    assert metadata["model_fingerprint"] == raw(data, "merged").metadata["model_fingerprint"]
    assert metadata["base_fingerprint"] == raw(data, "exp").metadata["model_fingerprint"]
    assert raw(data, "exp").response.token_ids == before
    assert read_json(data / "experiments/exp/config.json")["inference_model"] == str(tiny_folder)


@needs_peft
def test_add_ons_projections_and_python_know_the_adapter(
    capture: Run, extract: Run, data: Path, lora: str, tmp_path: Path, tiny_folder: Path
) -> None:
    extract()
    result = capture("--adapter", lora, "--variant", "v", "--attention")
    assert result.exit_code == 0, result.output
    assert "weights differ" not in result.output  # the vectors are those of the model that it adapts
    folder = data / "experiments/exp"
    assert (folder / "analysis/per_token/short@v/1_attention.json").is_file()
    assert (folder / "inference/tone/loud/residual_stream/short@v/1.json").is_file()
    replayed = capture("--adapter", lora, "--variant", "v", "--logit-lens", "--replay")
    assert replayed.exit_code == 0, replayed.output
    assert (folder / "analysis/per_token/short@v/1_logit_lens.json").is_file()
    wrong = capture("--variant", "v", "--logit-lens", "--replay")
    assert wrong.exit_code == 1
    assert "replay it with the same model" in wrong.stderr
    assert capture("--adapter", lora, "--variant", "v", "--skip-existing").output.count("loading") == 0
    cap = Experiment("exp", data).captures["short@v"]["1"]
    saved = read_json(folder / "analysis/per_token/short@v/1_attention.json")["attention"][-1]["by_layer"][1]
    (folder / "analysis/per_token/short@v/1_attention.json").unlink()
    assert cap.attention(1).patterns[:, -1] == pytest.approx(torch.tensor(saved).numpy(), rel=1e-3, abs=1e-4)


@needs_peft
def test_another_adapter_does_not_replace_the_captures_of_a_variant(
    capture: Run, data: Path, lora: str, zero: str
) -> None:
    assert capture("--adapter", lora, "--variant", "v").exit_code == 0
    refused = capture("--adapter", zero, "--variant", "v")
    assert refused.exit_code == 2
    assert f"short@v holds captures with adapter {lora}: choose another --variant" in refused.stderr
    plain = capture("--variant", "v")
    assert plain.exit_code == 2
    assert raw(data, "exp", "1", "short@v").metadata["adapter"] == lora
    assert capture("--adapter", zero, "--variant", "v", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("nowhere", "no such folder: expected one with adapter_config.json"), ("", "not an adapter")],
)
def test_what_is_not_an_adapter_is_refused_before_anything_is_loaded(
    folder: str, expected: str, capture: Run, data: Path, tmp_path: Path
) -> None:
    result = capture("--adapter", folder or tmp_path)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (data / "experiments/exp").exists()


@needs_peft
@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("how", ["generated", "given"])
def test_an_adapter_scaled_to_zero_gives_exact_zeros(
    how: str, engine: str, capture: Run, extract: Run, tlcapture: Run, data: Path, zero: str
) -> None:
    assert extract("--engine", engine).exit_code == 0
    assert capture("--engine", engine).exit_code == 0
    if how == "generated":
        assert capture("--adapter", zero, "--engine", engine).exit_code == 0
    else:
        words = ("--adapter", zero, "--responses-from", "exp", "--engine", engine)
        result = tlcapture("capture", "--experiment", "exp", *words)
        assert result.exit_code == 0, result.output
    result = tlcapture("compare", "exp/short", "exp/short@zero")
    assert result.exit_code == 0, result.output
    for name in ("1", "2", "3"):
        found = compared(data, b="exp@zero", name=name)
        assert set(found["kl"]) == {0.0}
        assert {value for row in found["residual"]["cosine"] for value in row} == {1.0}
        assert all(set(found["traits"][trait]["difference"]) == {0.0} for trait in TRAITS)


def test_given_tokens_have_the_activations_of_hugging_faces_model(
    capture: Run, tlcapture: Run, data: Path, tuned_folder: Path
) -> None:
    assert capture("--temperature", "1").exit_code == 0
    words = ("--experiment", "tuned", "--model", tuned_folder, "--responses-from", "exp/short", *FULL)
    result = tlcapture("capture", *words, "--attention", "--logit-lens", "--layer-internals", 1)
    assert result.exit_code == 0, result.output
    for name in ("1", "2", "3"):
        source, found = raw(data, "exp", name), raw(data, "tuned", name)
        assert (found.token_ids, found.tokens, found.spans) == (source.token_ids, source.tokens, source.spans)
        states, logits = hidden_states(tuned_folder, source.token_ids)
        for layer in range(3):
            torch.testing.assert_close(found.residual(layer).double(), states[layer], rtol=1e-3, atol=1e-3)
        metadata = found.metadata
        for key in ("prompt_text", "temperature", "seed", "stop_reason", "max_new_tokens", "chat_template", "bos"):
            assert metadata.get(key) == source.metadata.get(key), key
        assert metadata["inference_model"] == str(tuned_folder)
        assert metadata["tokens_from"]["inference_experiment"] == "exp"
        assert metadata["tokens_from"]["model_fingerprint"] == source.metadata["model_fingerprint"]
        lens = read_json(data / f"experiments/tuned/analysis/per_token/short/{name}_logit_lens.json")
        probs = logits.softmax(-1)
        for entry in lens["predictions"]:
            at = entry["token_idx"]
            expected = float(probs[at, source.token_ids[at + 1]])
            assert entry["by_layer"][-1]["actual_prob"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert (data / f"experiments/tuned/inference/raw/internals/short/{name}_L1.pt").is_file()


def test_the_same_model_gives_the_bits_that_were_generated(capture: Run, tlcapture: Run, data: Path) -> None:
    assert capture("--temperature", "1", "--capture-attn").exit_code == 0
    words = ("--responses-from", "exp", "--variant", "again", "--capture-attn")
    result = tlcapture("capture", "--experiment", "exp", *words)
    assert result.exit_code == 0, result.output
    for name in ("1", "2", "3"):
        for part in ("prompt", "response"):
            ours, theirs = (getattr(raw(data, "exp", name, each), part).residual for each in ("short@again", "short"))
            assert torch.equal(ours.points, theirs.points)
            assert torch.equal(ours.attn_out, theirs.attn_out)


def test_given_tokens_are_skipped_while_they_are_the_same(capture: Run, tlcapture: Run, data: Path) -> None:
    assert capture().exit_code == 0
    words = ("capture", "--experiment", "exp", "--responses-from", "exp", "--variant", "again", "--skip-existing")
    assert tlcapture(*words).exit_code == 0
    again = tlcapture(*words)
    assert again.exit_code == 0
    assert "loading" not in again.output
    assert capture("--seed", 5).exit_code == 0
    result = tlcapture(*words)
    assert result.exit_code == 0, result.output
    for name in ("1", "2", "3"):
        assert raw(data, "exp", name, "short@again").token_ids == raw(data, "exp", name).token_ids


def test_prompts_without_a_response_are_read(capture: Run, tlcapture: Run, data: Path, tuned_folder: Path) -> None:
    assert capture("--max-new-tokens", 0).exit_code == 0
    words = ("--experiment", "tuned", "--model", tuned_folder, "--responses-from", "exp")
    assert tlcapture("capture", *words).exit_code == 0
    assert raw(data, "tuned").token_ids == raw(data, "exp").token_ids
    assert raw(data, "tuned").response.tokens == []


def test_sets_can_be_chosen_and_a_dry_run_writes_nothing(
    capture: Run, tlcapture: Run, data: Path, tuned_folder: Path
) -> None:
    assert capture(prompts=("--prompt-set", "short,other")).exit_code == 0
    words = ("capture", "--experiment", "tuned", "--model", tuned_folder, "--responses-from", "exp")
    dry = tlcapture(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "4 prompts to capture" in dry.output
    assert not (data / "experiments/tuned").exists()
    assert tlcapture(*words, "--prompt-set", "other").exit_code == 0
    assert [path.name for path in (data / "experiments/tuned/inference/raw/residual").iterdir()] == ["other"]
    missing = tlcapture(*words, "--prompt-set", "none")
    assert missing.exit_code == 2
    assert "exp: no captures of none; captured sets: other, short" in missing.stderr


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "its own captures": (("--experiment", "exp", "--responses-from", "exp"), "would replace captures of exp"),
    "its own variant": (
        ("--experiment", "exp", "--responses-from", "exp/short@v", "--variant", "v"),
        "exp/short@v: no captures",
    ),
    "a missing experiment": (("--experiment", "x", "--responses-from", "none"), "no experiment 'none'"),
    "a missing set": (("--experiment", "x", "--responses-from", "exp/none"), "exp/none: no captures"),
    "a prompt": (("--experiment", "x", "--responses-from", "exp", "--prompt", "hi"), "leave out --prompt"),
    "a length": (("--experiment", "x", "--responses-from", "exp", "--max-new-tokens", "3"), "--max-new-tokens"),
    "a seed": (("--experiment", "x", "--responses-from", "exp", "--seed", "3"), "leave out --seed"),
    "a replay": (("--experiment", "x", "--responses-from", "exp", "--replay", "--attention"), "leave out --replay"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_run_again_is_refused(what: str, capture: Run, tlcapture: Run, data: Path) -> None:
    assert capture("--max-new-tokens", 2).exit_code == 0
    words, expected = REFUSED[what]
    result = tlcapture("capture", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.output
    assert not (data / "experiments/x").exists()


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    capture: Run, tlcapture: Run, data: Path, tmp_path: Path
) -> None:
    assert capture().exit_code == 0
    folder = tmp_path / "other"
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["h"], vocabulary["z"] = vocabulary["z"], vocabulary["h"]
    path.write_text(json.dumps(content))
    result = tlcapture("capture", "--experiment", "x", "--model", folder, "--responses-from", "exp")
    assert result.exit_code == 2
    assert "come from another tokenizer than this model's: token" in result.stderr
    assert "is 'h' there, and 'z' here" in result.stderr
    assert not (data / "experiments/x/inference").exists()


def test_a_damaged_capture_is_a_failure_of_its_own(capture: Run, tlcapture: Run, data: Path) -> None:
    assert capture().exit_code == 0
    (data / "experiments/exp/inference/raw/residual/short/2.pt").write_bytes(b"damaged")
    result = tlcapture("capture", "--experiment", "exp", "--responses-from", "exp", "--variant", "v")
    assert result.exit_code == 1
    assert "short/2" in result.stderr
    found = data / "experiments/exp/inference/raw/residual/short@v"
    assert sorted(path.name for path in found.glob("*.pt")) == ["1.pt", "3.pt"]
    assert isinstance(Capture.open(found / "1.pt").metadata["tokens_from"], dict)


@pytest.mark.parametrize("options", [(), ("--tokens", "first:2"), ("--projections-only",)])
def test_other_options_of_capture_apply(
    options: tuple[str, ...], capture: Run, extract: Run, tlcapture: Run, data: Path
) -> None:
    extract()
    capture()
    words = ("--responses-from", "exp", "--variant", "v", "--limit", 2, *options)
    result: Any = tlcapture("capture", "--experiment", "exp", *words)
    assert result.exit_code == 0, result.output
    folder = data / "experiments/exp/inference"
    assert len(list((folder / "tone/loud/residual_stream/short@v").glob("*.json"))) == 2
    assert bool(list((folder / "raw/residual/short@v").glob("*.pt"))) == ("--projections-only" not in options)
