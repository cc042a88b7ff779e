"""Of a checkpoint with several parts, the text model is taken: it equals what Hugging Face's whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tlcapture.generation.loop import teacher_force
from tlcapture.models.checkpoints.checkpoint import fingerprint
from tlcapture.models.checkpoints.text_models import auto_class_of
from tlcapture.models.loading import load_model, outline_model
from tlcapture.views.residual import residual_hooks, residual_view

_CLIP = {**tiny.VISION, "model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = {**tiny.VISION, "model_type": "siglip_vision_model"}
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
_QWEN3_VISION = {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN3_TEXT = {**tiny._GROUPED, "head_dim": 8, "rope_parameters": _AXES}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

# The whole model's config, and the architecture whose engine runs its text.
WHOLE: dict[str, tuple[Callable[[], Any], str]] = {
    "mistral3": (
        lambda: transformers.Mistral3Config(
            text_config=tiny.CONFIGS["mistral"]().to_dict(),
            vision_config={**tiny.VISION, "model_type": "pixtral", "head_dim": 8},
        ),
        "MistralForCausalLM",
    ),
    "qwen2_vl": (
        lambda: transformers.Qwen2VLConfig(
            text_config={**tiny._GROUPED, "rope_parameters": _AXES},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen2_5_vl": (
        lambda: transformers.Qwen2_5_VLConfig(
            text_config={**tiny._GROUPED, "rope_parameters": _AXES}, vision_config=_QWEN_VISION
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen3_vl": (
        lambda: transformers.Qwen3VLConfig(text_config=_QWEN3_TEXT, vision_config=_QWEN3_VISION),
        "Qwen3ForCausalLM",
    ),
    "qwen3_vl_moe": (
        lambda: transformers.Qwen3VLMoeConfig(text_config={**_QWEN3_TEXT, **_EXPERTS}, vision_config=_QWEN3_VISION),
        "Qwen3MoeForCausalLM",
    ),
    "gemma3": (tiny.MULTIMODAL["gemma3_multimodal"], "Gemma3ForCausalLM"),
    "llava": (
        lambda: transformers.LlavaConfig(
            text_config=tiny.CONFIGS["llama"]().to_dict(), vision_config=_CLIP, image_token_index=10
        ),
        "LlamaForCausalLM",
    ),
    "llava_onevision": (
        lambda: transformers.LlavaOnevisionConfig(
            text_config=tiny.CONFIGS["qwen2"]().to_dict(), vision_config=_SIGLIP, image_token_index=10
        ),
        "Qwen2ForCausalLM",
    ),
    "paligemma": (
        lambda: transformers.PaliGemmaConfig(
            text_config=tiny.CONFIGS["gemma"]().to_dict(),
            vision_config=_SIGLIP,
            projection_dim=tiny.D_MODEL,
            image_token_index=10,
        ),
        "GemmaForCausalLM",
    ),
    "idefics3": (
        lambda: transformers.Idefics3Config(
            text_config=tiny.CONFIGS["llama"]().to_dict(), vision_config=tiny.VISION, image_token_id=10
        ),
        "LlamaForCausalLM",
    ),
    "internvl": (
        lambda: transformers.InternVLConfig(
            text_config=tiny.CONFIGS["qwen2"]().to_dict(),
            vision_config={**tiny.VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen2_audio": (
        lambda: transformers.Qwen2AudioConfig(
            text_config=tiny.CONFIGS["qwen2"]().to_dict(),
            audio_config={
                "d_model": 16,
                "encoder_ffn_dim": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "num_mel_bins": 8,
            },
        ),
        "Qwen2ForCausalLM",
    ),
    "aya_vision": (
        lambda: transformers.AyaVisionConfig(
            text_config=transformers.Cohere2Config(**tiny._GROUPED, logit_scale=0.3).to_dict(),
            vision_config=_SIGLIP,
            image_token_index=10,
        ),
        "Cohere2ForCausalLM",
    ),
}

IDS = [0, *range(40, 70)]


@cache
def whole(name: str) -> Any:
    """A random model with all its parts."""
    config = WHOLE[name][0]()
    torch.manual_seed(0)
    model = getattr(transformers, auto_class_of(config)).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model.eval()


def saved(name: str, folder: Path) -> Path:
    whole(name).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(WHOLE))
def test_the_text_model_equals_the_whole_model_of_hugging_face(name: str, tmp_path: Path) -> None:
    model = load_model(str(saved(name, tmp_path)), check=False)
    assert model.hf_config.architectures == [WHOLE[name][1]]
    assert outline_model(str(tmp_path)).measures == model.measures
    with torch.no_grad():
        theirs = whole(name)(input_ids=torch.tensor([IDS]), output_hidden_states=True)
    stream = residual_view(teacher_force(model, IDS, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        torch.testing.assert_close(stream.at(layer, "residual_in"), theirs.hidden_states[layer][0], rtol=0, atol=1e-4)
    last = stream.at(model.n_layers - 1, "residual_out")
    torch.testing.assert_close(model.unembed(last), theirs.logits[0], rtol=1e-4, atol=1e-4)


def test_the_fingerprint_is_that_of_a_checkpoint_of_the_text_model_alone(tmp_path: Path) -> None:
    found = load_model(str(saved("llava", tmp_path)), check=False).fingerprint
    alone = transformers.LlamaForCausalLM(tiny.CONFIGS["llama"]())
    alone.model = whole("llava").model.language_model
    alone.lm_head = whole("llava").lm_head
    assert found == fingerprint(alone)
