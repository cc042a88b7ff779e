"""Tiny random checkpoints of many families of language models, one config for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.tiny import ALIBI, BRIDGE_ONLY, CONFIGS, VOCABULARY

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_UNGROUPED = {"num_key_value_heads": 4}
_GPT_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
_GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    **_UNGROUPED,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}


def _config(kind: str, *unused: str, **changes: Any) -> Callable[[], Any]:
    """The config class `kind` with small sizes: those of `_SIZES` but the `unused`, with changes."""

    def build() -> Any:
        sizes = {name: value for name, value in _SIZES.items() if name not in unused}
        return getattr(transformers, kind)(**{**sizes, **changes})

    return build


FAMILIES: dict[str, Callable[[], Any]] = {
    "AFMoE": _config("AfmoeConfig", **_EXPERTS, num_shared_experts=1, num_dense_layers=1, sliding_window=8),
    "Apertus": _config("ApertusConfig"),
    "Arcee": _config("ArceeConfig"),
    "Bamba": _config("BambaConfig", **_MAMBA, attn_layer_indices=[1]),
    "BioGPT": _config("BioGptConfig", "num_key_value_heads"),
    "BitNet": _config("BitNetConfig"),
    "BLOOM": _config("BloomConfig", n_layer=2, n_head=4),
    "CodeGen": _config("CodeGenConfig", **_GPT_NAMES, rotary_dim=4),
    "Cohere": _config("CohereConfig", logit_scale=0.25),
    "Cohere 2": _config("Cohere2Config", **_SLIDING),
    "CTRL": _config("CTRLConfig", **_GPT_NAMES, dff=48),
    "CWM": _config("CwmConfig", **_SLIDING),
    "DeepSeek-V2": _config("DeepseekV2Config", **_LATENT, **_ROUTED_EXPERTS, **_GROUPS, topk_method="greedy"),
    "DeepSeek-V3": _config("DeepseekV3Config", **_LATENT, **_ROUTED_EXPERTS, **_GROUPS),
    "DiffLlama": _config("DiffLlamaConfig"),
    "Doge": _config("DogeConfig", keep_window_size=2048),
    "dots.llm1": _config("Dots1Config", **_ROUTED_EXPERTS, **_GROUPS),
    "ERNIE 4.5": _config("Ernie4_5Config"),
    "ERNIE 4.5 MoE": _config(
        "Ernie4_5_MoeConfig", moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1
    ),
    "EXAONE 4": _config("Exaone4Config", **_SLIDING),
    "Falcon": _config("FalconConfig", num_kv_heads=1, new_decoder_architecture=False, alibi=False),
    "Falcon, new decoder": _config("FalconConfig", num_kv_heads=2, new_decoder_architecture=True, alibi=False),
    "Falcon with ALiBi": ALIBI["falcon_alibi"],
    "Falcon-H1": _config("FalconH1Config", **_MAMBA, mamba_d_ssm=64),
    "Falcon Mamba": _config("FalconMambaConfig", state_size=8),
    "FlexOlmo": _config("FlexOlmoConfig", **_EXPERTS),
    "Gemma": CONFIGS["gemma"],
    "Gemma 2": CONFIGS["gemma2"],
    "Gemma 3": CONFIGS["gemma3"],
    "Gemma 3n": _config(
        "Gemma3nTextConfig", **_PER_LAYER, head_dim=16, **_SLIDING, laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "Gemma 4": _config(
        "Gemma4TextConfig", **_PER_LAYER, head_dim=16, global_head_dim=16, **_SLIDING,
    ),
    "GLM": _config("GlmConfig", head_dim=16),
    "GLM-4": _config("Glm4Config", head_dim=16),
    "GLM-4 MoE": _config("Glm4MoeConfig", **_ROUTED_EXPERTS, **_GROUPS, head_dim=16),
    "GLM-4 MoE Lite": _config("Glm4MoeLiteConfig", **_LATENT, **_ROUTED_EXPERTS, **_GROUPS),
    "GPT": _config("OpenAIGPTConfig", **_GPT_NAMES),
    "GPT-2": CONFIGS["gpt2"],
    "GPT-BigCode": _config("GPTBigCodeConfig", **_GPT_NAMES),
    "GPT-J": CONFIGS["gptj"],
    "GPT-Neo": CONFIGS["gpt_neo"],
    "GPT-NeoX": CONFIGS["gpt_neox"],
    "GPT-NeoX Japanese": _config("GPTNeoXJapaneseConfig", intermediate_multiple_size=2),
    "gpt-oss": _config(
        "GptOssConfig", **_LOCAL_EXPERTS, head_dim=16, **_SLIDING,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "Granite": _config(
        "GraniteConfig", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "Granite MoE": _config("GraniteMoeConfig", **_LOCAL_EXPERTS, logits_scaling=2.0, embedding_multiplier=3.0),
    "Granite MoE Hybrid": _config(
        "GraniteMoeHybridConfig", **_MAMBA, **_LOCAL_EXPERTS, layer_types=["mamba", "attention"],
        shared_intermediate_size=24, embedding_multiplier=3.0, position_embedding_type="rope",
    ),
    "Granite MoE Shared": _config("GraniteMoeSharedConfig", **_LOCAL_EXPERTS, shared_intermediate_size=24),
    "Helium": _config("HeliumConfig", head_dim=8),
    "HunYuan": _config("HunYuanDenseV1Config", head_dim=8),
    "HunYuan MoE": _config("HunYuanMoEV1Config", num_experts=4, moe_topk=2, head_dim=8),
    "InternLM 3": _config("LlamaConfig", attention_bias=True),
    "Jais 2": _config("Jais2Config"),
    "Jamba": _config(
        "JambaConfig", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "JetMoE": _config("JetMoeConfig", **_LOCAL_EXPERTS, kv_channels=8),
    "LFM2": _config("Lfm2Config", layer_types=["conv", "full_attention"]),
    "LFM2 MoE": _config("Lfm2MoeConfig", **_EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "Llama": CONFIGS["llama"],
    "Llama 3": CONFIGS["llama3_rope"],
    "Llama 4": _config(
        "Llama4TextConfig", **_LOCAL_EXPERTS, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=64,
        moe_layers=[1],
    ),
    "Mamba": _config("MambaConfig", state_size=8),
    "Mamba 2": _config("Mamba2Config", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "MiniMax": _config("MiniMaxConfig", **_LOCAL_EXPERTS, head_dim=8, **_LINEAR_FIRST),
    "MiniMax-M2": _config("MiniMaxM2Config", **_LOCAL_EXPERTS, head_dim=8),
    "Ministral": _config("MinistralConfig", head_dim=8, **_SLIDING),
    "Ministral 3": _config("Ministral3Config", head_dim=8),
    "Mistral": CONFIGS["mistral"],
    "Mixtral": _config("MixtralConfig", **_LOCAL_EXPERTS),
    "ModernBERT decoder": _config("ModernBertDecoderConfig"),
    "MPT": ALIBI["mpt"],
    "nanochat": _config("NanoChatConfig"),
    "Nemotron": _config("NemotronConfig"),
    "Nemotron-H": _config(
        "NemotronHConfig", layers_block_type=["mamba", "attention", "moe", "mamba"], ssm_state_size=8,
        mamba_num_heads=8, mamba_head_dim=8, n_groups=1, chunk_size=8, head_dim=8, moe_latent_size=None,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24,
    ),
    "OLMo": _config("OlmoConfig"),
    "OLMo 2": CONFIGS["olmo2"],
    "OLMo 3": _config("Olmo3Config", **_SLIDING),
    "OLMo Hybrid": _config("OlmoHybridConfig", **_LINEAR, **_LINEAR_FIRST),
    "OLMoE": _config("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "OPT": CONFIGS["opt"],
    "Persimmon": _config("PersimmonConfig"),
    "Phi": _config("PhiConfig"),
    "Phi-3": CONFIGS["phi3"],
    "Phi-3 with LongRoPE": BRIDGE_ONLY["phi3_longrope"],
    "Phi-MoE": _config("PhimoeConfig", **_LOCAL_EXPERTS),
    "Qwen2": CONFIGS["qwen2"],
    "Qwen2 MoE": _config("Qwen2MoeConfig", **_EXPERTS, shared_expert_intermediate_size=24),
    "Qwen3": CONFIGS["qwen3"],
    "Qwen3 MoE": _config("Qwen3MoeConfig", **_EXPERTS, head_dim=16),
    "Qwen3-Next": _config(
        "Qwen3NextConfig", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=24,
        **_LINEAR_FIRST,
    ),
    "Qwen3.5": _config("Qwen3_5TextConfig", **_LINEAR, **_LINEAR_FIRST),
    "Qwen3.5 MoE": _config(
        "Qwen3_5MoeTextConfig", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=24,
        **_LINEAR_FIRST,
    ),
    "RecurrentGemma": _config(
        "RecurrentGemmaConfig", block_types=["recurrent", "attention"], lru_width=32, attention_window_size=64
    ),
    "RWKV": _config("RwkvConfig", attention_hidden_size=32),
    "Seed-OSS": _config("SeedOssConfig", head_dim=8),
    "SmolLM3": _config("SmolLM3Config", no_rope_layers=[1, 0]),
    "StableLM": _config("StableLmConfig"),
    "StarCoder 2": _config("Starcoder2Config"),
    "T5": _config("T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "VaultGemma": _config(
        "VaultGemmaConfig", head_dim=16, **_SLIDING
    ),
    "XGLM": _config("XGLMConfig", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "Youtu": _config("YoutuConfig", **_LATENT),
    "Zamba2": _config(
        "Zamba2Config", layers_block_type=["mamba", "hybrid"], mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8,
        chunk_size=8,
        attention_head_dim=16, num_mem_blocks=1, use_mem_rope=True,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """A Hugging Face model of a family in float32; weights, norms and biases are random, so that each one matters."""
    torch.manual_seed(sum(map(ord, name)))
    model = class_of(config := FAMILIES[name]()).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    model.config.architectures = [type(model).__name__]
    return model.eval()


def class_of(config: Any) -> Any:
    """The class of transformers that makes a model of a config."""
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
