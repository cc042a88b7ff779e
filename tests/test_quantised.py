"""Quantised checkpoints: dequantised as their format defines, or refused with the packages to install."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from tests import tiny
from tlcapture.errors import ModelError
from tlcapture.generation.loop import teacher_force
from tlcapture.models.checkpoints import quantised
from tlcapture.models.deviation import deviation
from tlcapture.models.loading import load_model
from tlcapture.views.residual import residual_hooks, residual_view

IDS = [0, *range(40, 60)]
BLOCK = 16
GROUP = 32
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def state_quantisation(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def assert_equals(model: Any, theirs: Any, bound: float = 1e-4) -> None:
    with torch.no_grad():
        out = theirs(torch.tensor([IDS]), output_hidden_states=True)
    stream = residual_view(teacher_force(model, IDS, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        assert deviation(stream.at(layer, "residual_in"), out.hidden_states[layer][0]) < bound
    assert deviation(model.unembed(stream.at(model.n_layers - 1, "residual_out")), out.logits[0]) < bound


def quantise_to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in float8 and the factor of each block by which they are multiplied again."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return values, scale


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_fp8_weights_are_multiplied_by_the_scales_of_their_blocks(engine: str, tmp_path: Path) -> None:
    folder = saved(tiny.hf_model("llama", torch.bfloat16), tmp_path / "fp8")
    weights, theirs = load_file(folder / "model.safetensors"), copy.deepcopy(tiny.hf_model("llama", torch.bfloat16))
    stored = dict(weights)
    for name, weight in weights.items():
        if "_proj" in name:
            values, scale = quantise_to_fp8(weight)
            stored |= {name: values, f"{name}_scale_inv": scale}
            by_hand = values.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            theirs.get_parameter(name).data = by_hand.to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    state_quantisation(
        folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    )
    model = load_model(str(folder), engine=engine)
    assert (model.engine, model.dtype) == (engine, torch.float32)
    assert_equals(model, theirs.float())


def test_mxfp4_experts_are_decoded_as_the_format_defines(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        **{**tiny._GROUPED, "intermediate_size": 32, "head_dim": 8},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=12,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
    folder = saved(theirs, tmp_path / "mxfp4")
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, n_in, n_out = stored.pop(name).shape
        blocks = torch.randint(0, 256, (n_experts, n_out, n_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (n_experts, n_out, n_in // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1).flatten(-2)
        by_hand = (pairs * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
        theirs.get_parameter(name).data = by_hand.to(torch.bfloat16).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    state_quantisation(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert_equals(load_model(str(folder)), theirs.float())


@pytest.mark.parametrize(
    ("quantisation", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "quanto"}, "optimum-quanto"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "auto-round"}, "auto-round"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "bridge"])
def test_a_method_that_needs_a_package_names_it(
    engine: str, quantisation: dict[str, Any], packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.models.checkpoints.quantised._is_installed", lambda module: module == "accelerate")
    folder = saved(tiny.hf_model("llama"), tmp_path / "model")
    state_quantisation(folder, quantisation)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), engine=engine)
    assert f"run 'pip install {packages}'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
def test_every_method_of_transformers_is_loaded_or_refused_with_what_to_do(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.models.checkpoints.quantised._is_installed", lambda module: module == "accelerate")
    folder = saved(tiny.hf_model("llama"), tmp_path / "model")
    state_quantisation(folder, {"quant_method": method})
    if method in ("fp8", "mxfp8", "mxfp4"):
        assert load_model(str(folder)).engine == tiny.ENGINES[0]  # none of its layers is quantised
        return
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    if method == "bitnet":  # needs no other package: these weights lack what the method stores
        assert any(each in message for each in ("incomplete", "cannot be loaded", "weights of other shapes"))
        return
    assert "use weights that are not quantised" in message or "expected weights that are not quantised" in message


def test_a_method_that_fails_with_its_packages_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny.hf_model("llama"), tmp_path / "model")
    state_quantisation(folder, {"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr("tlcapture.models.checkpoints.quantised._is_installed", lambda module: True)

    def fail(*args: object, **options: object) -> None:
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr("tlcapture.models.loading.fetch_weights", fail)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), engine="bridge")
    assert str(caught.value) == (
        f"model {str(folder)!r} is quantised by the method 'gptq', which does not run here: NotImplementedError: "
        "no kernel: use weights that are not quantised"
    )


def test_weights_that_cannot_be_dequantised_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny.hf_model("llama"), tmp_path / "model")
    state_quantisation(folder, {"quant_method": "fp8", "activation_scheme": "dynamic"})

    def fail(*args: object) -> None:
        raise NotImplementedError("unimplemented operator\nfor Float8Tensor")

    monkeypatch.setattr("tlcapture.models.checkpoints.quantised.dequantised", fail)
    with pytest.raises(
        ModelError, match=r"'fp8', which does not run here: NotImplementedError: unimplemented operator:"
    ):
        load_model(str(folder))


def test_a_quantisation_of_the_text_part_alone_is_found() -> None:
    config = transformers.Gemma3Config()
    config.text_config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert quantised.method_of(config) == "gptq"
    quantised.forget(config)
    assert quantised.method_of(config) is None


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_8_bit_weights_of_torchao_are_those_that_its_layers_multiply_by(engine: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    base = saved(tiny.hf_model("llama", torch.bfloat16), tmp_path / "base")
    settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    packed = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    folder, theirs = saved(packed, tmp_path / "quantised"), copy.deepcopy(tiny.hf_model("llama", torch.bfloat16))
    for name, layer in packed.named_modules():
        if name.endswith("_proj"):
            with torch.no_grad():
                weight = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T
            assert not torch.equal(weight, theirs.get_submodule(name).weight)
            theirs.get_submodule(name).weight.data = weight.contiguous()
    assert_equals(load_model(str(folder), engine=engine), theirs.float())


@pytest.mark.parametrize("method", ["some-new-method", None])
def test_an_unknown_method_is_refused_rather_than_taken_for_none(method: str | None, tmp_path: Path) -> None:
    folder = saved(tiny.hf_model("llama"), tmp_path / "model")
    state_quantisation(folder, {"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"is quantised by the method {str(method)!r}: expected weights"):
        load_model(str(folder))


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_compressed_fp8_weights_are_multiplied_by_the_scale_of_their_row(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = saved(tiny.hf_model("llama", torch.bfloat16), tmp_path / "compressed")
    weights, theirs = load_file(folder / "model.safetensors"), copy.deepcopy(tiny.hf_model("llama", torch.bfloat16))
    stored = dict(weights)
    for name, weight in weights.items():
        if "_proj" in name:
            scale = (weight.float().abs().amax(dim=1, keepdim=True) / 448).to(torch.bfloat16)
            values = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored |= {name: values, f"{name}_scale": scale}
            theirs.get_parameter(name).data = (values.float() * scale.float()).to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    of_weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": of_weights}
    state = {"format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    state_quantisation(folder, {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **state})
    assert_equals(load_model(str(folder), engine=engine), theirs.to(torch.float32))


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_4_bit_weights_of_bitsandbytes_give_what_hugging_face_computes(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    wide = transformers.LlamaConfig(**{**tiny._GROUPED, "hidden_size": 128, "intermediate_size": 128})  # whole blocks
    base = saved(transformers.LlamaForCausalLM(wide), tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, attn_implementation="eager"
    )
    folder = saved(theirs, tmp_path / "quantised")
    assert_equals(load_model(str(folder), engine=engine), theirs, bound=1e-2)  # whose kernel computes in 16 bits


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_4_bit_weights_packed_into_words_give_what_their_format_defines(method: str, tmp_path: Path) -> None:
    for package in ("optimum", "gptqmodel"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    wide = transformers.LlamaConfig(**{**tiny._GROUPED, "hidden_size": 128, "intermediate_size": 128})
    theirs = transformers.LlamaForCausalLM(wide).half().eval()
    folder = saved(theirs, tmp_path / method)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stem, _, _ = name.rpartition(".")
        if not stem.endswith("_proj"):
            stored[name] = weight
            continue
        values, zeros, scales, back = quantise_to_4_bits(weight)
        parts = packed_as(method, values, zeros) | {"scales": scales}
        stored |= {f"{stem}.{part}": each.contiguous() for part, each in parts.items()}
        theirs.get_submodule(stem).weight.data = back.half()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "gptq": {"desc_act": False, "sym": False, "checkpoint_format": "gptq"},
        "awq": {"zero_point": True, "version": "gemm"},
    }
    state_quantisation(folder, {"quant_method": method, "bits": 4, "group_size": GROUP, **fields[method]})
    assert_equals(load_model(str(folder), engine="bridge", dtype="float32"), theirs.float(), bound=2e-3)


def quantise_to_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Integers `[in, out]`, zeros and scales `[groups, out]`, and the weight `[out, in]` that these stand for."""
    groups = weight.float().T.reshape(-1, GROUP, len(weight))
    low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    values = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    back = (values - zeros[:, None]) * scales.float()[:, None]
    return values.reshape(-1, len(weight)), zeros, scales, back.reshape(-1, len(weight)).T


def packed_as(method: str, values: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of GPTQ (zeros less one), or of AWQ, whose words hold columns in an order of its own."""
    if method == "gptq":
        groups = (torch.arange(len(values)) // GROUP).to(torch.int32)
        return {"qweight": packed(values.T).T, "qzeros": packed(zeros - 1), "g_idx": groups}
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    in_order = (each.reshape(len(each), -1, 8)[..., order].flatten(1) for each in (values, zeros))
    return dict(zip(("qweight", "qzeros"), map(packed, in_order), strict=True))


def packed(values: torch.Tensor) -> torch.Tensor:
    """Eight values of 4 bits a word, the first in the lowest bits."""
    words = (values.to(torch.int64).reshape(len(values), -1, 8) << (4 * torch.arange(8))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
