"""Engines refuse models that they cannot compute exactly as Hugging Face does, with a one-line reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.evidence import Evidence
from tests.families import FAMILIES
from tests.test_parity import random_ids
from tlcapture.errors import ModelError
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.models.checkpoints.checkpoint import cast
from tlcapture.models.engines.base import _context_with_fixed_frequencies
from tlcapture.models.engines.bridge import BridgeModel
from tlcapture.models.loading import from_hugging_face
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.residual import residual_hooks

_OPT = {**tiny._COMMON, "ffn_dim": tiny.D_MLP, "word_embed_proj_dim": tiny.D_MODEL}
_OPT.pop("intermediate_size")
_SMALL = {"vocab_size": tiny.VOCABULARY, "hidden_size": tiny.D_MODEL}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


_LOCAL_ROPE_SCALED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

NOT_ON_HOOKED: dict[str, tuple[Any, str]] = {
    "llama_biased": (tiny.BRIDGE_ONLY["llama_biased"], "Llama with attention biases"),
    "llama_mlp_biased": (lambda: transformers.LlamaConfig(**tiny._GROUPED, mlp_bias=True), "Llama with MLP biases"),
    "llama_yarn": (tiny.BRIDGE_ONLY["llama_yarn"], "rotary embeddings of type 'yarn'"),
    "llama_dynamic": (tiny.BRIDGE_ONLY["llama_dynamic"], "rotary embeddings of type 'dynamic'"),
    "llama3_partial": (
        lambda: transformers.LlamaConfig(
            **tiny._GROUPED, **_rope(rope_type="llama3", partial_rotary_factor=0.5, **_LLAMA3)
        ),
        "partial rotary embeddings of type 'llama3'",
    ),
    "llama_mish": (
        lambda: transformers.LlamaConfig(**tiny._GROUPED, hidden_act="mish"),
        "the activation 'mish'",
    ),
    "llama_xielu": (
        lambda: transformers.LlamaConfig(**tiny._GROUPED, hidden_act="xielu"),
        "the activation 'xielu' with learned parameters",
    ),
    "mistral_linear_rope": (
        tiny.BRIDGE_ONLY["mistral_linear_rope"],
        "scaled rotary embeddings in layers with a sliding window",
    ),
    "qwen3_biased": (
        lambda: transformers.Qwen3Config(**tiny._GROUPED, attention_bias=True),
        "Qwen3 with attention biases",
    ),
    "gemma3_local_rope_scaled": (
        lambda: transformers.Gemma3TextConfig(**tiny._GROUPED, head_dim=16, rope_parameters=_LOCAL_ROPE_SCALED),
        "rotary embeddings of type 'linear' in local layers",
    ),
    "gemma3_bidirectional": (
        lambda: transformers.Gemma3TextConfig(**tiny._GROUPED, head_dim=16, use_bidirectional_attention=True),
        "Gemma-3 with attention in both directions",
    ),
    "olmo2_grouped": (tiny.BRIDGE_ONLY["olmo2_grouped"], "OLMo-2 with grouped queries"),
    "phi3_partial_rotary": (tiny.BRIDGE_ONLY["phi3_partial_rotary"], "Phi-3 with partial rotary embeddings"),
    "phi3_longrope": (
        tiny.BRIDGE_ONLY["phi3_longrope"],
        "rotary embeddings of type 'longrope' for this architecture",
    ),
    "gpt_neox_unbiased": (
        lambda: transformers.GPTNeoXConfig(**tiny._COMMON, attention_bias=False),
        "GPT-NeoX without attention biases",
    ),
    "gpt2_cross_attention": (
        lambda: transformers.GPT2Config(**tiny._GPT2_NAMES, add_cross_attention=True),
        "cross attention",
    ),
    "opt_norm_after": (
        lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=False),
        "OPT with the norm after each sublayer",
    ),
    "opt_projected": (
        lambda: transformers.OPTConfig(**{**_OPT, "word_embed_proj_dim": 16}),
        "OPT with projected embeddings",
    ),
    "opt_norms_without_weights": (
        lambda: transformers.OPTConfig(**_OPT, layer_norm_elementwise_affine=False),
        "OPT with norms without weights",
    ),
    "opt_without_final_norm": (
        lambda: transformers.OPTConfig(**_OPT, _remove_final_layer_norm=True),
        "OPT without a final norm",
    ),
    "opt_unbiased": (lambda: transformers.OPTConfig(**_OPT, enable_bias=False), "OPT without biases"),
}


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def reason(model: Any, engine: str) -> str:
    """The one-line error with which an engine refuses a model."""
    with pytest.raises(ModelError) as caught:
        from_hugging_face(model, tiny.tokenizer(), name="tiny", engine=engine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@tiny.needs_hooked
@pytest.mark.parametrize("architecture", list(NOT_ON_HOOKED))
def test_hooked_names_the_unsupported_feature(architecture: str, evidence: Evidence) -> None:
    config, what = NOT_ON_HOOKED[architecture]
    message = f"HookedTransformer does not compute {what}"
    assert reason(build(config()), "hooked") == f"engine 'hooked' does not cover 'tiny': {message}; use --engine bridge"
    evidence.refused(architecture, "hooked", message)


@tiny.needs_hooked
def test_hooked_lists_its_supported_architectures(evidence: Evidence) -> None:
    message = reason(build(transformers.BloomConfig(**_SMALL, n_layer=2, n_head=4)), "hooked")
    assert "BloomForCausalLM is not one of GPT2LMHeadModel, " in message
    assert "Gemma3ForCausalLM" in message
    evidence.refused("bloom", "hooked", "BloomForCausalLM is not one of the supported architectures")


@tiny.needs_hooked
def test_hooked_refuses_quantised_weights(evidence: Evidence) -> None:
    model = copy.deepcopy(tiny.hf_model("llama"))
    model.config.quantization_config = {"quant_method": "gptq"}
    assert "its weights are quantised" in reason(model, "hooked")
    evidence.refused("llama, quantised", "hooked", "its weights are quantised")


@pytest.mark.parametrize("architecture", list(tiny.BRIDGE_ONLY))
def test_auto_uses_the_bridge_for_models_that_hooked_refuses(architecture: str) -> None:
    model = copy.deepcopy(tiny.hf_model(architecture))
    assert from_hugging_face(model, tiny.tokenizer(), name="tiny", engine="auto").engine == "bridge"


_CACHE = "TransformerBridge computes other activations for it token by token in a padded batch than in one pass"
NOT_ON_BRIDGE: dict[str, tuple[Any, str]] = {
    "rwkv": (
        lambda: transformers.RwkvConfig(**_SMALL, num_hidden_layers=2),
        "RwkvForCausalLM is not supported: TransformerBridge has no blocks.0.attn.hook_pattern for it",
    ),
    "opt_projected": (
        NOT_ON_HOOKED["opt_projected"][0],
        "OPTForCausalLM is not supported: TransformerBridge has no ln_final for it",
    ),
    "opt_norm_after": (NOT_ON_HOOKED["opt_norm_after"][0], "TransformerBridge does not run OPTForCausalLM"),
    "ctrl": (
        lambda: transformers.CTRLConfig(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, dff=64),
        "TransformerBridge does not run CTRLLMHeadModel",
    ),
}
NOT_ON_BRIDGE_3 = {
    "mpt": (tiny.ALIBI["mpt"], f"MptForCausalLM is not supported: {_CACHE}"),
    "falcon_alibi": (tiny.ALIBI["falcon_alibi"], f"FalconForCausalLM is not supported: {_CACHE}"),
}
if "hooked" in tiny.ENGINES:
    NOT_ON_BRIDGE |= NOT_ON_BRIDGE_3


@pytest.mark.parametrize("architecture", list(NOT_ON_BRIDGE))
def test_the_bridge_gives_the_reason_for_a_refusal(architecture: str, evidence: Evidence) -> None:
    config, what = NOT_ON_BRIDGE[architecture]
    assert reason(build(config()), "bridge").startswith(f"tiny: {what}")
    evidence.refused(architecture, "bridge", what)


def test_an_assertion_of_transformerlens_is_a_refusal_too() -> None:
    several = transformers.GPTBigCodeConfig(
        vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=1, n_head=4, multi_query=False
    )
    assert reason(build(several), "bridge").startswith("tiny: TransformerBridge does not run GPTBigCodeForCausalLM: ")


def test_an_assertion_without_a_message_is_quoted() -> None:
    unbiased = transformers.GPTNeoXConfig(**tiny._COMMON, attention_bias=False)
    assert "GPTNeoXForCausalLM: TransformerLens fails at 'assert " in reason(build(unbiased), "bridge")


def test_logits_that_involve_more_than_the_lens_computes_are_refused(evidence: Evidence) -> None:
    model = copy.deepcopy(tiny.hf_model("llama"))
    original = model.forward

    def shifted(*args: Any, **options: Any) -> Any:
        out = original(*args, **options)
        out.logits = out.logits.roll(1, dims=-1)
        return out

    model.forward = shifted
    what = "its logits involve more than final norm, unembedding, scale and soft cap, which a logit lens would silently"
    assert reason(model, "bridge").startswith(f"tiny: LlamaForCausalLM is not supported: {what} omit")
    evidence.refused("llama, with other logits", "bridge", f"{what} omit")


def test_prompts_longer_than_the_longrope_threshold_are_refused(evidence: Evidence) -> None:
    """Beyond it, one long row changes the frequencies of all rows of its batch and of its own earlier tokens."""
    model = tiny.model("phi3_longrope", "bridge")
    long, short = (
        TokenizedPrompt("set", name, "", "", tuple(random_ids(length)), None, False)
        for name, length in (("long", 61), ("short", 60))
    )
    hooks = residual_hooks(model.n_layers, model.hook_names)
    outcomes = {outcome.prompt.id: outcome for outcome in generate(model, [long, short], hooks=hooks, max_new_tokens=4)}
    refused = outcomes["long"]
    assert isinstance(refused, Failure) and not isinstance(outcomes["short"], Failure)
    assert "61 prompt tokens and 4 new ones are more than the model's context of 64" in refused.reason
    evidence.refused(
        "phi3_longrope, beyond original_max_position_embeddings", "bridge", "does not fit the model's context"
    )


_FACTORS = {"factor": 4.0, "short_factor": [1.0] * 128, "long_factor": [2.0] * 128}
_LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 48, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "n_ctx"),
    [
        (transformers.Gemma3TextConfig(rope_parameters={"full_attention": {**_LONGROPE, **_FACTORS}}), 48),
        (transformers.Llama4TextConfig(floor_scale=64), 63),
        (transformers.Llama4TextConfig(floor_scale=64, attn_temperature_tuning=False), 100),
        (transformers.Llama4TextConfig(floor_scale=64, no_rope_layers=[1] * 48), 100),
    ],
)
def test_the_context_ends_where_positions_would_depend_on_the_batch(config: Any, n_ctx: int) -> None:
    assert _context_with_fixed_frequencies(config, 100) == n_ctx


@pytest.mark.parametrize(
    ("lens", "hugging_face", "advice"),
    [
        ("3.9.0", "5.23.0", 'pip install "transformer_lens>=4,<5" may help'),
        ("4.3.0", "5.24.1", 'pip install "transformer_lens<4" may help'),
        ("4.3.0", "5.31.0.dev0", 'pip install "transformers<5.25" may help'),
    ],
)
def test_a_refusal_because_of_versions_names_them_and_the_command_that_may_help(
    lens: str, hugging_face: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each step ignored the cache, which is what a new name of it did under transformers 5.24."""
    installed = {"transformer_lens": lens, "transformers": hugging_face}
    monkeypatch.setattr("tlcapture.models.engines.versions.version", installed.__getitem__)
    step = BridgeModel.step

    def forgetful(
        self: BridgeModel, tokens: torch.Tensor, mask: torch.Tensor, state: object, *args: object, **options: object
    ) -> object:
        return step(self, tokens, mask, self.start(len(tokens)), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(BridgeModel, "step", forgetful)
    with pytest.raises(ModelError) as caught:
        from_hugging_face(copy.deepcopy(tiny.hf_model("llama")), tiny.tokenizer(), name="tiny", engine="bridge")
    assert str(caught.value).endswith(f"found TransformerLens {lens} and transformers {hugging_face}; {advice}")


@pytest.mark.parametrize(
    ("family", "dtype", "end"),
    [
        ("Doge", torch.float32, "has no adapter for it"),
        ("XGLM", torch.bfloat16, "; try --dtype float32"),
    ],
)
def test_a_refusal_names_only_what_helps(family: str, dtype: torch.dtype, end: str) -> None:
    """No version of TransformerLens has an adapter for Doge, and both compute XGLM in float32 alone."""
    hf = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager")
    cast(hf, dtype)
    with pytest.raises(ModelError, match=rf"TransformerBridge does not run .*{end}$"):
        from_hugging_face(hf, tiny.tokenizer(), name="tiny", engine="bridge")
