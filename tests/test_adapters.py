"""PEFT adapters are merged into the weights of their model, as peft and Hugging Face do, or refused."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.families import build
from tlcapture.doctor.run import run_doctor
from tlcapture.errors import ModelError
from tlcapture.generation.loop import teacher_force
from tlcapture.models.checkpoints.transfer import ModelFiles
from tlcapture.models.deviation import deviation
from tlcapture.models.loading import load_model, outline_model
from tlcapture.runs.display import Display
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.views.residual import residual_hooks, residual_view

IDS = [0, *range(40, 60)]
RANK, ALPHA = 4, 12
TARGETS = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 64)}
needs_peft = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('peft')", reason="peft is missing")


@cache
def lora() -> dict[str, torch.Tensor]:
    """The weights of an adapter for three linear maps of every layer of the tiny Llama, by name."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for layer in range(tiny.N_LAYERS):
        for target, (n_out, n_in) in TARGETS.items():
            name = f"base_model.model.model.layers.{layer}.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator) * 0.3
            weights[f"{name}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator) * 0.3
    return weights


def merged_by_hand(dtype: torch.dtype = torch.float32) -> Any:
    """The tiny Llama with W + (alpha / rank) B A in place of the adapted W."""
    model = copy.deepcopy(tiny.hf_model("llama"))
    with torch.no_grad():
        for name, a in lora().items():
            if name.endswith("lora_A.weight"):
                b = lora()[name.replace("lora_A", "lora_B")]
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(path).weight.add_(ALPHA / RANK * b @ a)
    return model


def write_base(folder: Path, name: str = "llama") -> Path:
    tiny.hf_model(name).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: str | None, weights: dict[str, torch.Tensor] | None = None, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [target.split(".")[1] for target in TARGETS],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(lora() if weights is None else weights, folder / "adapter_model.safetensors")
    return str(folder)


def one_line(name: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name, check=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equals_merged(model: Any, theirs: Any, ids: list[int] = IDS) -> None:
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_hidden_states=True)
    stream = residual_view(teacher_force(model, ids, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        assert deviation(stream.at(layer, "residual_in"), out.hidden_states[layer][0]) < 1e-4
    logits = model.unembed(stream.at(model.n_layers - 1, "residual_out"))
    assert deviation(logits, out.logits[0]) < 1e-4


@needs_peft
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_an_adapter_beside_full_weights_is_merged(engine: str, tmp_path: Path) -> None:
    folder = write_adapter(write_base(tmp_path / "both"), "some/model-that-is-not-there")
    assert_equals_merged(load_model(folder, engine=engine), merged_by_hand())


@needs_peft
@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("relative", [False, True])
def test_an_adapter_alone_is_loaded_with_its_base(engine: str, relative: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", "../base" if relative else str(base))
    model = load_model(folder, engine=engine)
    assert_equals_merged(model, merged_by_hand())
    assert model.name == folder
    assert outline_model(folder).measures == model.measures


@needs_peft
def test_the_merged_weights_equal_those_of_peft_in_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    import peft
    import transformers

    base = tmp_path / "base"
    tiny.hf_model("llama", torch.bfloat16).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear", modules_to_save=["lm_head"], bias="none"
    )
    tuned = peft.get_peft_model(plain, settings)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    ours = load_model(str(tmp_path / "adapter"))
    assert ours.fingerprint == load_model(str(tmp_path / "merged")).fingerprint
    assert ours.fingerprint != load_model(str(base)).fingerprint
    assert_equals_merged(ours, theirs.float())


@needs_peft
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_of_a_tied_embedding_changes_no_other_module(targets: list[str], tmp_path: Path) -> None:
    import peft

    base = write_base(tmp_path / "base", "gemma")  # ties its embedding and unembedding
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(copy.deepcopy(tiny.hf_model("gemma")), settings).eval()
    tuned.save_pretrained(tmp_path / "adapter")  # names no model, since that one was made in memory
    assert_equals_merged(load_model(str(base), adapter=str(tmp_path / "adapter")), tuned)


@needs_peft
def test_an_adapter_that_repeats_layers_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", str(base), layer_replication=[[0, 2], [1, 3]])
    assert "repeats layers of the model (layer_replication)" in one_line(folder)


@needs_peft
@pytest.mark.parametrize("start", ["pissa_niter_4", "lora_ga"])
def test_an_adapter_of_weights_that_cannot_be_made_again_is_refused(start: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    message = one_line(write_adapter(tmp_path / "adapter", str(base), init_lora_weights=start))
    assert f"(init_lora_weights {start!r}) was trained beside weights that no file has" in message


@needs_peft
def test_added_tokens_get_the_rows_of_the_adapter(tmp_path: Path) -> None:
    import peft

    base = write_base(tmp_path / "base")
    larger = copy.deepcopy(tiny.hf_model("llama"))
    larger.resize_token_embeddings(tiny.VOCABULARY + 2, mean_resizing=False)
    tuned = peft.get_peft_model(
        larger, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"))
    assert model.d_vocab == tiny.VOCABULARY + 2
    assert_equals_merged(model, tuned.merge_and_unload(), [*IDS, tiny.VOCABULARY, tiny.VOCABULARY + 1])


def with_trained_tokens(folder: Path, n_tokens: int, targets: list[str]) -> Any:
    """The tiny Gemma, whose embedding is tied, with LoRA and two tokens that are trained alone; saved as an adapter."""
    import peft

    base, model = write_base(folder / "base", "gemma"), copy.deepcopy(tiny.hf_model("gemma"))
    if n_tokens > tiny.VOCABULARY:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    config = peft.LoraConfig(target_modules=targets, trainable_token_indices=[IDS[3], n_tokens - 1])
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "trainable_tokens_delta" in name or "lora_B" in name:
                weight.add_(torch.randn_like(weight))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder / "adapter")
    return tuned.eval()


@needs_peft
def test_tokens_trained_alone_in_a_larger_tied_embedding_are_merged(tmp_path: Path) -> None:
    """peft writes them twice."""
    tuned = with_trained_tokens(tmp_path, tiny.VOCABULARY + 2, ["q_proj"])
    assert_equals_merged(load_model(str(tmp_path / "adapter")), tuned, [*IDS, tiny.VOCABULARY + 1])


@needs_peft
def test_lora_around_two_parameters_of_experts_is_merged(tmp_path: Path) -> None:
    import peft

    base, experts = tmp_path / "base", build("gpt-oss")
    experts.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    with torch.no_grad():
        before = experts(torch.tensor([IDS])).logits
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = peft.get_peft_model(experts, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight))
        assert deviation(tuned.eval()(torch.tensor([IDS])).logits, before) > 0.1
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(tmp_path / "adapter")
    assert_equals_merged(load_model(str(tmp_path / "adapter")), tuned)


@needs_peft
def test_lora_around_tokens_that_are_trained_alone_is_refused(tmp_path: Path) -> None:
    """What peft merges differs from what it computes without merging."""
    tuned, ids = with_trained_tokens(tmp_path, tiny.VOCABULARY, ["q_proj", "lm_head"]), torch.tensor([IDS])
    assert "its adapter adapts lm_head in two ways" in one_line(str(tmp_path / "adapter"))
    with torch.no_grad():
        before = tuned(ids).logits
        assert deviation(tuned.merge_and_unload()(ids).logits[0], before[0]) > 1e-2


@pytest.mark.usefixtures("quick_collections")
@needs_peft
def test_doctor_compares_with_the_merged_model(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", str(write_base(tmp_path / "base")))
    checks = {check.name: check for check in run_doctor(ModelLoader(folder, Display()))}
    assert checks["raw basis"].verdict == "ok"


@needs_peft
@pytest.mark.parametrize("layer", ["model.layers.7.self_attn.q_proj", "model.layers.0.self_attn.k_proj"])
def test_an_adapter_with_weights_for_other_modules_is_refused(layer: str, tmp_path: Path) -> None:
    name = f"base_model.model.{layer}.lora_A.weight"
    folder = write_adapter(
        tmp_path / "adapter", str(write_base(tmp_path / "base")), {**lora(), name: torch.zeros(RANK, 32)}
    )
    assert "its adapter does not fit" in one_line(folder) and layer in one_line(folder)


@needs_peft
def test_an_adapter_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    weights = {name: weight for name, weight in lora().items() if ".layers.1." not in name}
    folder = write_adapter(tmp_path / "adapter", str(write_base(tmp_path / "base")), weights)
    assert "its adapter does not fit" in one_line(folder)


@needs_peft
def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", str(write_base(tmp_path / "base", "llama_ungrouped")))
    assert "its adapter cannot be merged" in one_line(folder)


@needs_peft
def test_an_adapter_without_weights_to_merge_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_adapter(folder, str(write_base(tmp_path / "base")))
    settings = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")})
    )
    assert "an adapter of type PROMPT_TUNING has no weights to merge" in one_line(str(folder))


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("beside", [True, False])
def test_without_peft_an_adapter_is_refused_with_the_command_that_installs_it(
    beside: bool, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    base = write_base(tmp_path / "base")
    message = one_line(write_adapter(base if beside else tmp_path / "adapter", str(base)), engine=engine)
    assert "has a PEFT adapter" in message and "pip install peft" in message


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert f"an adapter for the model {missing}, which does not exist" in one_line(
        write_adapter(tmp_path / "one", str(missing))
    )
    unknown = one_line(write_adapter(tmp_path / "two", "some-org/some-model", revision="v2"))
    assert "is an adapter: model 'some-org/some-model@v2' is neither a folder nor in the hub cache" in unknown


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"base_model_name_or_path": null}', '"text"'])
def test_an_adapter_config_that_names_no_model_is_refused(content: str, tmp_path: Path) -> None:
    folder = Path(write_adapter(tmp_path / "adapter", None))
    (folder / "adapter_config.json").write_text(content)
    assert "expected a PEFT adapter whose base_model_name_or_path names" in one_line(str(folder))


def test_a_model_without_an_adapter_is_loaded_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    assert load_model(str(write_base(tmp_path / "base"))).n_layers == tiny.N_LAYERS


@needs_peft
def test_a_worker_receives_an_adapter_together_with_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    folder = write_adapter(tmp_path / "adapter", str(write_base(tmp_path / "base")))
    files = ModelFiles.of(folder)
    assert files.found() == Path(folder).resolve()
    contents = {name: files.send(name) for name in files.sizes}
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "base")  # a machine that has neither
    assert files.found() is None
    received = files.receive(contents.__getitem__)
    assert files.found() == received
    assert_equals_merged(load_model(folder, source=received), merged_by_hand())


def zero_lora() -> dict[str, torch.Tensor]:
    """The adapter, scaled to zero."""
    return {name: weight * 0 if "lora_B" in name else weight for name, weight in lora().items()}


@needs_peft
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_an_adapter_that_is_named_beside_a_model_is_merged_into_it(engine: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "lora", "another/model")
    with pytest.warns(UserWarning, match=r"says that it is for 'another/model': it is merged into '.*base'"):
        model = load_model(str(base), engine, adapter=folder)
    assert_equals_merged(model, merged_by_hand())
    assert (model.name, model.adapter) == (str(base), folder)
    assert model.fingerprint == load_model(write_adapter(tmp_path / "same", str(base)), engine).fingerprint
    assert f"<model {str(base)!r} with adapter {folder!r} on engine {engine}" in repr(model)


@needs_peft
def test_a_named_adapter_of_the_same_model_is_merged_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = write_base(tmp_path / "base")
    for named in (str(base), "org/base", "org/base@main"):
        load_model(str(base), adapter=write_adapter(tmp_path / "lora", named), check=False)
    assert not [each for each in recwarn if "says that it is for" in str(each.message)]


@needs_peft
def test_an_adapter_scaled_to_zero_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "lora", str(base), zero_lora())
    merged = load_model(str(base), adapter=folder)
    assert merged.fingerprint == merged.adapted["base_fingerprint"] == load_model(str(base)).fingerprint


@needs_peft
def test_what_is_not_an_adapter_is_refused_in_one_line(tmp_path: Path) -> None:
    base = str(write_base(tmp_path / "base"))
    assert "'nowhere': no such folder: expected one with adapter_config.json" in one_line(base, adapter="nowhere")
    assert "not an adapter: the folder has no adapter_config.json" in one_line(base, adapter=base)
    other = write_base(tmp_path / "gpt2", "gpt2")
    wrong = one_line(str(other), adapter=write_adapter(tmp_path / "lora", base), warn=lambda text: None)
    assert "its adapter" in wrong
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert "expected the config of a PEFT adapter" in one_line(base, adapter=str(tmp_path / "lora"))


@needs_peft
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_damaged_file_of_an_adapter_is_named(suffix: str, tmp_path: Path) -> None:
    folder = Path(write_adapter(tmp_path / "lora", str(write_base(tmp_path / "base"))))
    path = folder / f"adapter_model.{suffix}"
    if suffix == "bin":
        torch.save(lora(), path)
        (folder / "adapter_model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:-500])
    assert f"{path}: " in (line := one_line(str(folder))) and "cut off" in line
    path.unlink()
    assert "adapter_model.safetensors: no such file" in one_line(str(folder))


@needs_peft
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_an_adapter_that_were_rounded_without_a_scale_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    rounded = {name: (weight * 50).to(dtype) for name, weight in lora().items()}
    folder = write_adapter(tmp_path / "lora", str(write_base(tmp_path / "base")), rounded)
    assert "its adapter has weights that are not of floating point: base_model." in one_line(folder)


@needs_peft
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_with_weights_that_are_not_finite_is_refused_by_file_and_tensor(
    named: bool, suffix: str, number: float, tmp_path: Path
) -> None:
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    weights = {**lora(), name: lora()[name].clone()}
    weights[name][2, 7] = number
    base = str(write_base(tmp_path / "base"))
    folder = Path(write_adapter(tmp_path / "lora", base, weights))
    if suffix == "bin":
        (folder / "adapter_model.safetensors").unlink()
        torch.save(weights, folder / "adapter_model.bin")
    line = one_line(base, adapter=str(folder)) if named else one_line(str(folder))
    assert f"adapter_model.{suffix}: {name} holds NaN or infinity: expected finite weights" in line


@needs_peft
def test_a_weight_of_the_base_that_is_not_finite_is_named_with_the_file_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{base / 'model.safetensors'}: model\.norm\.weight holds NaN"):
        load_model(write_adapter(tmp_path / "lora", str(base)))


@needs_peft
def test_a_weight_that_only_merging_makes_infinite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    huge = {name: weight * (1e22 if "down_proj" in name else 1) for name, weight in lora().items()}
    with pytest.raises(ModelError, match=r"cannot be used: model\.layers\.0\.mlp\.down_proj\.weight, .* hold NaN"):
        load_model(write_adapter(tmp_path / "lora", str(write_base(tmp_path / "base")), huge))


@needs_peft
def test_workers_of_a_cluster_receive_a_named_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "lora", str(base))
    files = ModelFiles.of(str(base), folder)
    assert "adapter/adapter_model.safetensors" in files.sizes
    assert files.found() == base
    expected = load_model(str(base), adapter=folder).fingerprint
    contents = {name: files.send(name) for name in files.sizes}
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    for path in (base, Path(folder)):
        shutil.rmtree(path)
    assert files.found() is None
    loader = ModelLoader(str(base), Display(), source=files.receive(contents.__getitem__), adapter=folder)
    model = loader()
    assert (model.fingerprint, model.adapter) == (expected, folder)
