"""Tiny seeded random models of many architectures, with a byte-level tokenizer."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tlcapture.models.engines.hooked import has_hooked_transformer

# Engines of the installed TransformerLens; `auto` uses the first one for most models.
ENGINES = ("hooked", "bridge") if has_hooked_transformer() else ("bridge",)
needs_hooked = pytest.mark.skipif("hooked" not in ENGINES, reason="TransformerLens 4 has no HookedTransformer")

DEVICE = os.environ.get("TLCAPTURE_TEST_DEVICE", "cpu")  # `make test-cuda` sets it
D_MODEL, N_LAYERS, N_HEADS, N_GROUPS, D_MLP = 32, 3, 4, 2, 64
SPECIAL = ["<bos>", "<eos>", "<turn>", "</turn>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def tokenizer(*, chat_template: str | None = CHAT_TEMPLATE, bos: bool = True) -> Any:
    """A tokenizer with one token per byte and four special tokens, whose ids are 0 to 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>" if bos else None, eos_token="<eos>"
    )
    fast.chat_template = chat_template
    return fast


VOCABULARY = len(SPECIAL) + 256

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_COMMON, "num_key_value_heads": N_GROUPS}
_GPT2_NAMES = {
    "vocab_size": VOCABULARY,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(**_GPT2_NAMES),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_layers=4,
        num_heads=N_HEADS,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gptj": lambda: transformers.GPTJConfig(**_GPT2_NAMES, rotary_dim=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**_COMMON, use_parallel_residual=False),
    "opt": lambda: transformers.OPTConfig(
        **{k: v for k, v in _COMMON.items() if k != "intermediate_size"}, ffn_dim=D_MLP, word_embed_proj_dim=D_MODEL
    ),
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama_ungrouped": lambda: transformers.LlamaConfig(**_COMMON, head_dim=16),
    "llama3_rope": lambda: transformers.LlamaConfig(
        **_GROUPED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_linear_rope": lambda: transformers.LlamaConfig(
        **_GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=12),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GROUPED,
        head_dim=16,
        sliding_window=12,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED,
        head_dim=16,
        sliding_window=12,
        sliding_window_pattern=2,
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "olmo2": lambda: transformers.Olmo2Config(**_COMMON),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED, sliding_window=12),
}

_HALF_OF_16 = [1.0, 1.3, 1.7, 2.0]  # one factor per rotated pair of dimensions of a head
BRIDGE_ONLY: dict[str, Any] = {
    "llama_biased": lambda: transformers.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "llama_yarn": lambda: transformers.LlamaConfig(
        **_GROUPED,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_dynamic": lambda: transformers.LlamaConfig(
        **_GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral_linear_rope": lambda: transformers.MistralConfig(
        **_GROUPED,
        sliding_window=12,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "olmo2_grouped": lambda: transformers.Olmo2Config(**_GROUPED),
    "phi3_partial_rotary": lambda: transformers.Phi3Config(**_GROUPED, partial_rotary_factor=0.5),
    "phi3_longrope": lambda: transformers.Phi3Config(
        **_GROUPED,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": _HALF_OF_16,
            "long_factor": [4 * factor for factor in _HALF_OF_16],
        },
    ),
}

# Models with ALiBi. TransformerBridge 3 computes wrong attention for them token by token; version 4 does not.
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": N_HEADS}
ALIBI: dict[str, Any] = {
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=D_MODEL, n_layers=2, n_heads=N_HEADS),
    "falcon_alibi": lambda: transformers.FalconConfig(**_SMALL, alibi=True, bos_token_id=0, eos_token_id=1),
}

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# Models whose text model is one of several parts; transformers loads them with the class for text-only models.
MULTIMODAL: dict[str, Any] = {
    "gemma3_multimodal": lambda: transformers.Gemma3Config(
        text_config=CONFIGS["gemma3"]().to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=10,
        boi_token_index=11,
        eoi_token_index=12,
    ),
}


@cache
def hf_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random Hugging Face model. Norms, biases and embeddings are random too, so omitting one changes the output.

    Buffers stay in float32, as in a checkpoint that transformers loads in 16 bits.
    """
    from tlcapture.models.checkpoints.checkpoint import cast

    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(
        (CONFIGS | BRIDGE_ONLY | ALIBI | MULTIMODAL)[name](), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    model.config.architectures = [type(model).__name__]
    cast(model, dtype)
    return model.eval()


@cache
def model(name: str, engine: str = ENGINES[0], dtype: torch.dtype = torch.float32) -> Any:
    """The tlcapture model with the weights of `hf_model(name, dtype)`.

    The engine `plain` is `hooked` without the fast forward pass. The bridge wraps a copy, since it modifies modules.
    """
    import copy

    from tlcapture.models.loading import from_hugging_face

    source = hf_model(name, dtype)
    if engine == "bridge":
        source = copy.deepcopy(source)
    if engine == "plain":
        return from_hugging_face(source, tokenizer(), name=f"tiny-{name}", engine="hooked", device=DEVICE, fast=False)
    return from_hugging_face(source, tokenizer(), name=f"tiny-{name}", engine=engine, device=DEVICE)
