"""Every check of `tlcapture doctor` passes on a sound model and fails on one broken on purpose."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tlcapture.doctor.checks import (
    Check,
    check_batch,
    check_bos,
    check_massive_dimensions,
    check_padding,
    check_range,
    check_raw_basis,
    check_recomputed,
    check_soft_caps,
    check_stop_ids,
    guarded,
    probe_prompts,
)
from tlcapture.doctor.reference import ReferenceRun, deviation, reference_run, reference_runs
from tlcapture.doctor.run import check_model
from tlcapture.models.checkpoints.checkpoint import cast
from tlcapture.models.engines.base import StepResult
from tlcapture.models.loading import Model, from_hugging_face

TWICE = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
NAMES = ["BOS", "padding", "stop ids", "raw basis", "attention", "batch", "captured", "soft caps", "range", "massive"]
PROMPTS = probe_prompts(tiny.tokenizer())


@cache
def runs(name: str) -> list[ReferenceRun]:
    return [reference_run(tiny.hf_model(name), prompt.token_ids) for prompt in PROMPTS]


def fresh(name: str, engine: str = tiny.ENGINES[0], change: Callable[[Any], object] = lambda hf: None) -> Model:
    """A new tiny model, with its Hugging Face weights changed first."""
    source = copy.deepcopy(tiny.hf_model(name))
    with torch.no_grad():
        change(source)
    return from_hugging_face(source, tiny.tokenizer(), name=f"tiny-{name}", engine=engine)


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_a_sound_model_passes_every_check(name: str, engine: str) -> None:
    found = list(check_model(tiny.model(name, engine), runs(name)))
    assert [check.name for check in found] == NAMES
    capless = "ok" if name == "gemma2" else "not applicable"
    assert [check.verdict for check in found] == ["ok"] * 7 + [capless, "ok", "ok"], found
    assert all("\n" not in check.detail for check in found)
    assert "deviation from Hugging Face" in found[3].detail and "1.0e-04 allowed" in found[3].detail


@pytest.mark.parametrize(
    ("template", "bos", "verdict", "expected"),
    [
        (
            tiny.CHAT_TEMPLATE,
            True,
            "ok",
            "1 by the chat template in front of a chat prompt, 1 in front of a plain text",
        ),
        (TWICE, True, "failed", "2 by the chat template in front of a chat prompt"),
        (tiny.CHAT_TEMPLATE.replace("{{ bos_token }}", ""), True, "warning", "0 in front of a chat prompt"),
        (None, True, "ok", "1 in front of a plain text"),
        (None, False, "ok", "the tokenizer has no BOS"),
    ],
)
def test_bos_is_counted_under_the_chat_template(template: str | None, bos: bool, verdict: str, expected: str) -> None:
    found = check_bos(tiny.tokenizer(chat_template=template, bos=bos))
    assert (found.verdict, expected in found.detail) == (verdict, True), found


def test_without_any_stop_id_the_check_fails() -> None:
    tokenizer = tiny.tokenizer(chat_template=None)
    assert check_stop_ids(tokenizer, None).detail == "1 '<eos>'"
    tokenizer.eos_token = None
    found = check_stop_ids(tokenizer, SimpleNamespace(eos_token_id=None))
    assert (found.verdict, found.detail[:5]) == ("failed", "none:")


def test_stop_ids_that_only_the_chat_template_defines_are_listed() -> None:
    assert check_stop_ids(tiny.tokenizer(), None).detail == "1 '<eos>', 3 '</turn>'; 3 only from the chat template"


@pytest.mark.parametrize("check", [check_padding, check_batch])
def test_unmasked_padding_is_found(check: Callable[..., Check], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    step = type(model).step

    def blind(self: Model, tokens: Any, mask: Any, state: Any, hooks: Any, *, want_logits: bool) -> StepResult:
        return step(self, tokens, torch.ones_like(mask), state, hooks, want_logits=want_logits)

    monkeypatch.setattr(type(model), "step", blind)
    monkeypatch.setattr(type(model), "prompt_steps", Model.prompt_steps)
    assert check(model, PROMPTS).verdict == "failed"


def test_decode_steps_that_differ_from_one_pass_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama")
    step = type(model).step

    def drifting(self: Model, tokens: Any, *args: Any, **options: Any) -> StepResult:
        made = step(self, tokens, *args, **options)
        bent = {name: value * 1.01 for name, value in made.cache.items()} if tokens.shape[1] == 1 else made.cache
        return StepResult(made.logits, bent)

    monkeypatch.setattr(type(model), "step", drifting)
    found = check_recomputed(model, PROMPTS)
    assert found.verdict == "failed"
    assert "from one pass over their tokens 1.0e-02: expected at most 0.0001" in found.detail


@tiny.needs_hooked
def test_processed_weights_are_found() -> None:
    """Centred weights change the residual stream; a centred unembedding changes only the logits."""
    model = fresh("gpt2")
    model.tl.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    found = check_raw_basis(model, runs("gpt2"))
    assert (found.verdict, "residual_in of layer" in found.detail) == ("failed", True), found
    model = fresh("gpt2")
    weight = model.tl.unembed.W_U
    weight.data = weight - weight.mean(dim=-1, keepdim=True)  # not in place: the embedding is tied to it
    found = check_raw_basis(model, runs("gpt2"))
    assert (found.verdict, "at the logits" in found.detail) == ("failed", True), found


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_in_bfloat16_a_model_is_measured_against_the_rounding_of_hugging_face(engine: str) -> None:
    half = copy.deepcopy(tiny.hf_model("llama", torch.bfloat16))
    exact = reference_runs(half, [prompt.token_ids for prompt in PROMPTS])
    assert all(run.rounding is not None and len(run.rounding) == 4 for run in exact)
    assert next(half.parameters()).dtype == torch.float32
    found = {check.name: check for check in check_model(tiny.model("llama", engine, torch.bfloat16), exact)}
    assert {check.verdict for check in found.values()} == {"ok", "not applicable"}, found

    def bend(hf: Any) -> None:
        cast(hf, torch.bfloat16)
        hf.model.layers[1].mlp.down_proj.weight.mul_(1.5)

    assert check_raw_basis(fresh("llama", engine, bend), exact).verdict == "failed"


def test_one_weight_that_is_off_by_a_thousandth_is_found() -> None:
    found = check_raw_basis(
        fresh("llama", change=lambda hf: hf.model.layers[1].mlp.down_proj.weight.mul_(1.001)), runs("llama")
    )
    assert found.verdict == "failed"


@tiny.needs_hooked
@pytest.mark.parametrize(
    ("field", "expected"),
    [("output_logits_soft_cap", "logits up to"), ("attn_scores_soft_cap", "attention under a cap of 2")],
)
def test_a_wrong_soft_cap_is_found(field: str, expected: str) -> None:
    model = fresh("gemma2")
    setattr(model.tl.cfg, field, 20.0)
    for block in model.tl.blocks:
        setattr(block.attn.cfg, field, 20.0)
    found = check_soft_caps(model, runs("gemma2"))
    assert (found.verdict, expected in found.detail) == ("failed", True), found


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_nan_weights_fail_every_check_they_affect(engine: str) -> None:
    def damage(hf: Any) -> None:
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan

    found = {check.name: check for check in check_model(fresh("llama", engine, damage), runs("llama"))}
    for name in ("raw basis", "attention", "batch", "captured", "range"):
        assert found[name].verdict == "failed", found[name]
    assert re.search(r"blocks.1.hook_resid_post is NaN or inf in float32: .*1.mlp.\S+ holds NaN", found["range"].detail)
    assert "the model's logits are NaN or inf" in found["batch"].detail
    assert all("tlcapture doctor" not in check.detail for check in found.values())  # which is what runs


@pytest.mark.parametrize(
    ("factor", "dtype", "verdict", "expected"),
    [
        (1.0, torch.float16, "ok", "of the float16 maximum"),
        (1e6, torch.float16, "failed", "blocks.0.hook_resid_pre is NaN or inf in float16"),
        (1e6, torch.float32, "warning", "captures are stored as bfloat16"),
        (1e6, torch.bfloat16, "ok", "less than 0.01 of the bfloat16 maximum"),
    ],
)
def test_activations_out_of_range_of_a_dtype_are_reported(
    factor: float, dtype: torch.dtype, verdict: str, expected: str
) -> None:
    def enlarge(hf: Any) -> None:
        hf.model.embed_tokens.weight.mul_(factor)
        cast(hf, dtype)

    found = check_range(fresh("llama", change=enlarge), PROMPTS)
    assert (found.verdict, expected in found.detail) == (verdict, True), found


def test_massive_dimensions_are_named_with_their_layers_and_their_share_of_the_norm() -> None:
    def enlarge(hf: Any) -> None:
        hf.model.embed_tokens.weight[:, 5] *= 1000

    found = check_massive_dimensions(fresh("llama", change=enlarge), PROMPTS)
    assert found.verdict == "ok"
    assert found.detail.startswith("5 (layers 0 to 2); after layer 1 they carry ")
    assert check_massive_dimensions(fresh("llama"), PROMPTS).detail == "none"


def test_a_deviation_is_a_share_of_each_tokens_own_norm() -> None:
    theirs = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    assert deviation(theirs + torch.tensor([[1.0, 0.0], [0.0, 0.1]]), theirs) == pytest.approx(0.1)
    assert not deviation(theirs * torch.nan, theirs) <= 1


def test_a_check_that_raises_has_failed() -> None:
    found = guarded(
        "batch", check_batch, fresh("llama"), [PROMPTS[0].__class__(**{**vars(PROMPTS[0]), "token_ids": (4,) * 300})]
    )
    assert found.verdict == "failed"
    assert "does not fit" in found.detail


def test_the_command_prints_one_line_per_check(tlcapture: Callable[..., Result], tiny_folder: Path) -> None:
    result = tlcapture("doctor", "--model", tiny_folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    *lines, following = result.stdout.splitlines()[-len(NAMES) - 1 :]
    assert following.startswith(f"next: tlcapture capture --experiment {tiny_folder.name} --model ")
    assert [line[16:27].strip() for line in lines] == NAMES
    assert {line[:16].strip() for line in lines} == {"ok", "not applicable"}


def test_its_exit_status_is_that_of_the_worst_check(tlcapture: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "double"
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer(chat_template=TWICE).save_pretrained(folder)
    result = tlcapture("doctor", "--model", folder)
    assert result.exit_code == 1
    assert "failed          BOS        2 by the chat template" in result.stdout
    missing = tlcapture("doctor", "--model", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "no such folder" in missing.stderr
    biased = tmp_path / "biased"
    tiny.hf_model("llama_biased").save_pretrained(biased)
    tiny.tokenizer().save_pretrained(biased)
    refused = tlcapture("doctor", "--model", biased, "--engine", "hooked")
    assert refused.exit_code == 2
    assert "engine 'hooked'" in refused.stderr
    assert "use --engine bridge" in refused.stderr
