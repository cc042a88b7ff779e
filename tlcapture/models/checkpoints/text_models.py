"""The text model of a checkpoint that has other parts too, such as one for images.

Its causal language model is built from the parts of the whole, so that it shares their weights and equals what the
whole computes for text. An engine then runs it like a checkpoint that has only text.
"""

from __future__ import annotations

import copy
from typing import Any

from tlcapture.errors import ModelError
from tlcapture.text import first_line

# Text configs without a causal language model of their own -> the architecture whose weights and, for text, whose
# computation they share, with what its config must state. Their rotary positions have three axes, equal for text.
_EQUIVALENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
_WITHOUT_LOGIT_SCALE = ("aya_vision", "cohere2_vision")  # as a whole, these do not scale the logits of their text model
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def auto_class_of(config: Any) -> str:
    """The auto class of transformers that loads the whole model of a config: the first one that knows it."""
    import transformers

    return next(
        (name for name in _AUTO_CLASSES if _class_of(config, getattr(transformers, name, None))), _AUTO_CLASSES[0]
    )


def name_class(config: Any) -> None:
    """Let a config name the class that transformers loads, which it chooses by model type whatever the file says."""
    import transformers

    kind = _class_of(config, getattr(transformers, auto_class_of(config)))
    if kind is not None:
        config.architectures = [kind.__name__]


def text_config_of(config: Any) -> Any:
    """The config of the causal language model that is captured: `config` itself unless it has several parts."""
    text = config.get_text_config()
    if text is config or getattr(config, "is_encoder_decoder", False):
        return config
    own = _causal_config(text)
    if own is None:
        return config
    own = copy.deepcopy(own)
    own.architectures = [_causal_class(own).__name__]
    for name in ("quantization_config", "_commit_hash", "name_or_path", "dtype"):
        if getattr(config, name, None) is not None:
            setattr(own, name, getattr(config, name))
    if config.model_type in _WITHOUT_LOGIT_SCALE:
        own.logit_scale = 1.0
    return own


def text_model_of(whole: Any) -> Any:
    """The causal language model of a Hugging Face model, which shares its weights; `whole` itself if it has one part.

    Raises `ModelError` if the weights do not fit the text model.
    """
    config = text_config_of(whole.config)
    if config is whole.config or isinstance(whole, _causal_class(config)):
        return whole
    try:
        return _taken_from(whole, config)
    except (AttributeError, RuntimeError) as error:
        kind = type(whole).__name__
        raise ModelError(f"the text model of a {kind} cannot be taken: {first_line(error)}") from None


def _taken_from(whole: Any, config: Any) -> Any:
    from transformers.initialization import no_init_weights

    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    config._attn_implementation = "eager"
    with no_init_weights():
        model = _causal_class(config)(config)
    inner = getattr(model, model.base_model_prefix)
    if type(inner) is type(decoder):
        setattr(model, model.base_model_prefix, decoder)
    else:
        inner.load_state_dict(decoder.state_dict(keep_vars=True), assign=True)
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    return model.eval()


def _causal_config(text: Any) -> Any:
    """A text config, or its equivalent, for which transformers has a causal language model; `None` if it has none."""
    from transformers import CONFIG_MAPPING

    if _causal_class(text) is not None:
        return text
    if text.model_type not in _EQUIVALENT:
        return None
    equivalent, stated = _EQUIVALENT[text.model_type]
    fields = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    fields["rope_parameters"] = _without_axes(fields.get("rope_parameters"))
    return CONFIG_MAPPING[equivalent](**{**fields, **stated})


def _without_axes(rope: dict[str, Any] | None) -> dict[str, Any]:
    kept = {key: value for key, value in (rope or {}).items() if not key.startswith("mrope")}
    return {**kept, "rope_type": "default" if kept.get("rope_type") == "mrope" else kept.get("rope_type", "default")}


def _causal_class(config: Any) -> Any:
    import transformers

    return _class_of(config, transformers.AutoModelForCausalLM)


def _class_of(config: Any, auto_class: Any) -> Any:
    mapping = getattr(auto_class, "_model_mapping", {})
    return mapping.get(type(config), None)
