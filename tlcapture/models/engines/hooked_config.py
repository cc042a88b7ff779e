"""Convert a Hugging Face config to a HookedTransformerConfig by architecture rather than by model name.

TransformerLens has a list of supported model names, but it can run any checkpoint of an architecture for which it has a
weight converter. This module maps architectures to their configs. A config with a feature that HookedTransformer does
not compute is refused with the reason, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

from tlcapture.errors import ModelError

Fields = dict[str, Any]


def covers(config: Any) -> str | None:
    """The reason why HookedTransformer cannot run the model of a Hugging Face config; `None` if it can."""
    architecture = architecture_of(config)
    if architecture not in _ARCHITECTURES:
        return f"{architecture} is not one of {', '.join(sorted(_ARCHITECTURES))}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised"
    try:
        fields = _ARCHITECTURES[architecture](config)
    except ModelError as error:
        return str(error)
    from transformer_lens.utilities import SUPPORTED_ACTIVATIONS

    activation = fields["act_fn"]
    if activation not in SUPPORTED_ACTIVATIONS:
        return f"HookedTransformer does not compute the activation {activation!r}"
    if activation == "xielu":  # no converter sets its parameters
        return "HookedTransformer does not compute the activation 'xielu' with learned parameters"
    return None


def architecture_of(config: Any) -> str:
    """The first architecture named in a Hugging Face config, or `unknown architecture`."""
    names = getattr(config, "architectures", None) or ["unknown architecture"]
    return str(names[0])


def hooked_fields(config: Any) -> Fields:
    """The fields of a `HookedTransformerConfig` for the model of a Hugging Face config.

    Raises:
        ModelError: HookedTransformer does not compute something that the config asks for.
    """
    fields = _ARCHITECTURES[architecture_of(config)](config)
    return {
        "original_architecture": architecture_of(config),
        "init_weights": False,
        "default_prepend_bos": False,
        **fields,
    }


def weight_converter(config: Any) -> Callable[[Any, Any], dict[str, Any]]:
    """TransformerLens's weight converter for the architecture: `(model, cfg)` -> state dict."""
    from transformer_lens.pretrained import weight_conversions

    return getattr(weight_conversions, _CONVERTERS[architecture_of(config)])


def _refuse(unsupported: bool, what: str) -> None:
    if unsupported:
        raise ModelError(f"HookedTransformer does not compute {what}")


def _gpt2(config: Any) -> Fields:
    _refuse(getattr(config, "add_cross_attention", False), "cross attention")
    return {
        **_gpt_names(config),
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _gpt_names(config: Any) -> Fields:
    """Fields shared by GPT-2 and GPT-J: the config names of their sizes, and LayerNorm."""
    return {
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "eps": config.layer_norm_epsilon,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
    }


def _gpt_neo(config: Any) -> Fields:
    return {
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_heads,
        "n_heads": config.num_heads,
        "d_mlp": config.intermediate_size or 4 * config.hidden_size,
        "n_layers": config.num_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.layer_norm_epsilon,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "use_attn_scale": False,
        "attn_types": list(config.attention_layers),
        "use_local_attn": True,
        "window_size": config.window_size,
        "normalization_type": "LN",
    }


def _gptj(config: Any) -> Fields:
    return {
        **_gpt_names(config),
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": config.rotary_dim or config.n_embd // config.n_head,
        "rotary_adjacent_pairs": True,
    }


def _gpt_neox(config: Any) -> Fields:
    _refuse(not getattr(config, "attention_bias", True), "GPT-NeoX without attention biases")
    rope = _plain_rope(config)
    d_head = config.hidden_size // config.num_attention_heads
    rotary_share = rope.get("partial_rotary_factor") or getattr(config, "rotary_pct", None) or 0.25
    return {
        **_sizes(config, d_head),
        "d_mlp": config.intermediate_size,
        "eps": config.layer_norm_eps,
        "act_fn": config.hidden_act,
        "parallel_attn_mlp": config.use_parallel_residual,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope["rope_theta"],
        "rotary_dim": int(d_head * rotary_share),
        "normalization_type": "LN",
    }


def _opt(config: Any) -> Fields:
    _refuse(not config.do_layer_norm_before, "OPT with the norm after each sublayer")
    _refuse(config.word_embed_proj_dim != config.hidden_size, "OPT with projected embeddings")
    _refuse(not config.enable_bias, "OPT without biases")
    _refuse(not config.layer_norm_elementwise_affine, "OPT with norms without weights")
    _refuse(config._remove_final_layer_norm, "OPT without a final norm")
    return {
        **_sizes(config, config.hidden_size // config.num_attention_heads),
        "d_mlp": config.ffn_dim,
        "eps": 1e-5,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
    }


def _llama(config: Any) -> Fields:
    _refuse(config.attention_bias, "Llama with attention biases")
    _refuse(config.mlp_bias, "Llama with MLP biases")
    return _gated_rms(config, plain_heads_without_groups=True)


def _mistral(config: Any) -> Fields:
    return {**_gated_rms(config), **_windows(config, everywhere=True)}


def _qwen2(config: Any) -> Fields:
    return {**_gated_rms(config), **_windows(config)}


def _qwen3(config: Any) -> Fields:
    _refuse(config.attention_bias, "Qwen3 with attention biases")
    return {**_gated_rms(config, plain_heads_without_groups=True), **_windows(config), "use_qk_norm": True}


def _gemma(config: Any) -> Fields:
    _refuse(config.attention_bias, "Gemma with attention biases")
    return {**_gated_rms(config), "act_fn": _gemma_activation(config)}


def _gemma2(config: Any) -> Fields:
    _refuse(config.attention_bias, "Gemma-2 with attention biases")
    return {**_gated_rms(config), **_since_gemma2(config)}


def _gemma3(config: Any) -> Fields:
    """Gemma-3's text model, whose local layers have a separate rotary base and no rotary scaling."""
    _refuse(config.attention_bias, "Gemma-3 with attention biases")
    _refuse(bool(config.use_bidirectional_attention), "Gemma-3 with attention in both directions")
    kinds = config.rope_parameters
    local = kinds.get("sliding_attention") or {"rope_theta": 10000.0}
    _refuse(_kind(local) != "default", f"rotary embeddings of type {_kind(local)!r} in local layers")
    return {
        **_gated_rms(config, kinds.get("full_attention") or local),
        **_since_gemma2(config),
        "rotary_base_local": local["rope_theta"],
        "use_qk_norm": True,
    }


def _since_gemma2(config: Any) -> Fields:
    """Fields shared by Gemma-2 and Gemma-3: windows, soft caps, norms on both sides of attention and MLP."""
    return {
        **_windows(config),
        "act_fn": _gemma_activation(config),
        "attn_scale": sqrt(config.query_pre_attn_scalar),
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
    }


def _olmo2(config: Any) -> Fields:
    _refuse(config.attention_bias, "OLMo-2 with attention biases")
    # TransformerLens's converter splits keys and values into as many heads as queries.
    _refuse(config.num_key_value_heads != config.num_attention_heads, "OLMo-2 with grouped queries")
    return _gated_rms(config, plain_heads_without_groups=True)


def _phi3(config: Any) -> Fields:
    rope = _plain_rope(config)
    _refuse((rope.get("partial_rotary_factor") or 1.0) != 1.0, "Phi-3 with partial rotary embeddings")
    return {**_gated_rms(config, plain_heads_without_groups=True), **_windows(config, everywhere=True)}


def _gated_rms(config: Any, rope: Fields | None = None, *, plain_heads_without_groups: bool = False) -> Fields:
    """Fields shared by Llama and its descendants: RMS norms, rotary positions, a gated MLP, grouped queries.

    Args:
        rope: rotary parameters that replace those of the config, for models whose layers differ in them.
        plain_heads_without_groups: whether the weight converter uses the parameter names of ungrouped attention if
            there are as many key-value heads as query heads; converters of TransformerLens differ in this.
    """
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_key_value_heads
    if plain_heads_without_groups and groups == config.num_attention_heads:
        groups = None
    return {
        **_sizes(config, d_head),
        "n_key_value_heads": groups,
        "d_mlp": config.intermediate_size,
        "eps": config.rms_norm_eps,
        "act_fn": getattr(config, "hidden_act", None) or "silu",
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": d_head,
        **_rotary(rope or _rope(config)),
    }


def _sizes(config: Any, d_head: int) -> Fields:
    """Sizes under the names that most configs have for them."""
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
    }


def _rope(config: Any) -> Fields:
    return dict(getattr(config, "rope_parameters", None) or {"rope_theta": 10000.0})


def _plain_rope(config: Any) -> Fields:
    rope = _rope(config)
    _refuse(_kind(rope) != "default", f"rotary embeddings of type {_kind(rope)!r} for this architecture")
    return rope


def _kind(rope: Fields) -> str:
    return rope.get("rope_type") or "default"


def _rotary(rope: Fields) -> Fields:
    kind = _kind(rope)
    share = rope.get("partial_rotary_factor") or 1.0
    _refuse(kind != "default" and share != 1.0, f"partial rotary embeddings of type {kind!r}")
    if kind == "llama3":
        return {
            "rotary_base": rope["rope_theta"],
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    if kind == "linear":
        return {"rotary_base": rope["rope_theta"], "rotary_scaling_factor": rope["factor"]}
    _refuse(kind != "default", f"rotary embeddings of type {kind!r}")
    return {"rotary_base": rope["rope_theta"]}


def _windows(config: Any, *, everywhere: bool = False) -> Fields:
    """Fields for sliding-window attention, layer by layer as in the Hugging Face config."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if everywhere and window else "full_attention"] * config.num_hidden_layers
    local = ["local" if kind == "sliding_attention" else "global" for kind in types]
    if not window or "local" not in local:
        return {}
    _refuse(_kind(_rope(config)) == "linear", "scaled rotary embeddings in layers with a sliding window")
    return {"use_local_attn": True, "window_size": window, "attn_types": local}


def _gemma_activation(config: Any) -> str:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return str(activation or "gelu_pytorch_tanh")


_ARCHITECTURES: dict[str, Callable[[Any], Fields]] = {
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoForCausalLM": _gpt_neo,
    "GPTJForCausalLM": _gptj,
    "GPTNeoXForCausalLM": _gpt_neox,
    "OPTForCausalLM": _opt,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Olmo2ForCausalLM": _olmo2,
    "Phi3ForCausalLM": _phi3,
}

_CONVERTERS = {
    "GPT2LMHeadModel": "convert_gpt2_weights",
    "GPTNeoForCausalLM": "convert_neo_weights",
    "GPTJForCausalLM": "convert_gptj_weights",
    "GPTNeoXForCausalLM": "convert_neox_weights",
    "OPTForCausalLM": "convert_opt_weights",
    "LlamaForCausalLM": "convert_llama_weights",
    "MistralForCausalLM": "convert_mistral_weights",
    "Qwen2ForCausalLM": "convert_qwen2_weights",
    "Qwen3ForCausalLM": "convert_qwen3_weights",
    "GemmaForCausalLM": "convert_gemma_weights",
    "Gemma2ForCausalLM": "convert_gemma_weights",
    "Gemma3ForCausalLM": "convert_gemma_weights",
    "Olmo2ForCausalLM": "convert_olmo2_weights",
    "Phi3ForCausalLM": "convert_phi3_weights",
}
