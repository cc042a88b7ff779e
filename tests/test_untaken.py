"""Weights in the files that no module takes are named, weights that modules lack are refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.untaken import untaken
from tlcapture.models.loading import load_model


def write(folder: Path, extra: dict[str, torch.Tensor], *, without: str | None = None, binary: bool = False) -> str:
    """A folder with the tiny Llama, further weights, and without those whose names contain a text."""
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if without is None or without not in name} | extra
    path.unlink()
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def warned(folder: str, **options: Any) -> list[str]:
    found: list[str] = []
    load_model(folder, check=False, warn=found.append, **options)
    return found


def layer(number: int) -> dict[str, torch.Tensor]:
    weights = tiny.hf_model("llama").state_dict()
    prefix = "model.layers.0."
    return {k.replace(prefix, f"model.layers.{number}."): v.clone() for k, v in weights.items() if k.startswith(prefix)}


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("binary", [False, True])
def test_a_bias_that_the_config_denies_is_named(engine: str, binary: bool, tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32), "model.layers.2.mlp.up_proj.bias": torch.ones(64)}
    found = warned(write(tmp_path, bias, binary=binary), engine=engine)
    assert len(found) == 1 and all(name in found[0] for name in bias) and "\n" not in found[0]


def test_layers_beyond_the_number_of_the_config_are_named(tmp_path: Path) -> None:
    found = warned(write(tmp_path, layer(3) | layer(4)))
    assert len(found) == 1 and "model.layers.3." in found[0] and f"and {2 * len(layer(3)) - 3} more" in found[0]


def test_python_is_warned_and_a_sound_checkpoint_warns_of_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="weights that no module takes.*: surplus: check"):
        load_model(write(tmp_path / "one", {"surplus": torch.ones(2)}), check=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(write(tmp_path / "two", {}), check=False)


def test_heads_that_predict_further_tokens_and_buffers_are_not_named(tmp_path: Path) -> None:
    known = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "mtp.fc.weight": torch.ones(2),
        "model.mtp_layers.0.norm.weight": torch.ones(2),
        "model.layers.3.eh_proj.weight": torch.ones(2),
        "model.layers.3.enorm.weight": torch.ones(2),
        "v_head.summary.weight": torch.ones(2),
        "model.vision_tower.layers.0.mlp.fc.weight": torch.ones(2),
    }
    assert warned(write(tmp_path, known | layer(3))) == []


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("without", ["lm_head", "layers.1.mlp.up_proj", "model.norm"])
def test_a_module_without_weights_is_refused(without: str, engine: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"incomplete: its checkpoint has no fitting .*{without}.*at random$"):
        load_model(write(tmp_path, {}, without=without), engine=engine)


def test_weights_under_other_names_are_named_beside_those_that_lack(tmp_path: Path) -> None:
    prefixed = {f"module.{key}": each.clone() for key, each in tiny.hf_model("llama").state_dict().items()}
    with pytest.raises(ModelError, match=r"no fitting lm_head.*at random; no module takes its module\.lm_head"):
        load_model(write(tmp_path, prefixed, without="."))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.norm.weight": torch.ones(7)})
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert warned(str(tmp_path)) == []


def test_scales_without_a_quantisation_in_the_config_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(ModelError, match=r"weight_scale_inv.*expected a quantization_config"):
        load_model(folder)


def test_capture_shows_the_warning(tlcapture: Any, tmp_path: Path) -> None:
    sets = tmp_path / "datasets" / "inference"
    sets.mkdir(parents=True)
    (sets / "one.json").write_text(json.dumps({"name": "one", "prompts": [{"id": "a", "text": "Hi"}]}))
    folder = write(tmp_path / "model", {"surplus.bias": torch.ones(2)})
    words = ["--experiment", "e", "--prompt-set", "one", "--model", folder, "--max-new-tokens", "2", "--no-project"]
    done = tlcapture("capture", *words)
    assert done.exit_code == 0
    assert "surplus.bias" in done.stderr + done.stdout


def test_names_of_a_gpt2_checkpoint_from_the_hub_are_known() -> None:
    """Its causal masks are buffers in old checkpoints."""
    config = copy.deepcopy(tiny.hf_model("gpt2").config)
    masks = ["h.0.attn.bias", "h.1.attn.masked_bias", "transformer.h.2.attn.bias"]
    assert untaken([*masks, "h.3.mlp.c_fc.weight", "h.0.attn.c_attn.other"], config) == [
        "h.0.attn.c_attn.other",
        "h.3.mlp.c_fc.weight",
    ]
