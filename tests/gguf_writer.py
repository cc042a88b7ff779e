"""Small GGUF files, written with the gguf package from the weights of tiny Hugging Face models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

_ARCHITECTURES = {"gemma3_text": "gemma3"}  # by model type; otherwise they are called alike


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file, in their order, with the merges of a byte-level one, and their types."""

    tokens: list[str]
    merges: list[str]
    types: list[int] = field(default_factory=list)
    model: str = "gpt2"


def write_gguf(
    path: Path,
    hf: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: Collection[str] = (),
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Write a model with a byte-level vocabulary.

    Args:
        metadata: further values of its architecture, by their names; `split.count` and those of its tokenizer are the
            file's own.
        tensors: further tensors.
        without: names of tensors to leave out.
        vocabulary: its tokens, in place of those of the tiny tokenizer.
    """
    import gguf

    config = hf.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    rule = {} if vocabulary else {"tokenizer.ggml.pre": "gpt-2"}
    for name, value in (rule | dict(metadata or {})).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](name if name.startswith(("split.", "tokenizer.")) else f"{architecture}.{name}", value)
    tokens = tiny.tokenizer().get_vocab()
    # The oldest gguf that setup.cfg allows reads a list of one as its element.
    own = vocabulary or Vocabulary([*sorted(tokens, key=tokens.__getitem__)[:-2], "ab", "ba"], ["a b", "b a"])
    writer.add_tokenizer_model(own.model)
    writer.add_token_list(own.tokens)
    if own.merges:
        writer.add_token_merges(own.merges)
    else:
        writer.add_token_scores([-float(number) for number in range(len(own.tokens))])
    if own.types:
        writer.add_token_types(own.types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    (known,) = (each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    written = {}
    for name, weight in hf.state_dict().items():
        kind, dot, suffix = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind.split(".")[-1])
        if heads and architecture == "llama":  # llama.cpp rotates adjacent pairs of a head's dimensions
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if architecture.startswith("gemma") and "norm" in kind:
            weight = weight + 1
        if not (config.tie_word_embeddings and kind == "lm_head"):
            written[f"{names.get_name(kind)}{dot}{suffix}"] = weight.float().contiguous().numpy()
    for name, array in {**written, **(tensors or {})}.items():
        if name not in without:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
