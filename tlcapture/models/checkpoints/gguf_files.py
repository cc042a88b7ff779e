"""GGUF files as Hugging Face models: weights dequantised, and a config that states what the file does.

transformers reads tensors and sizes, but no scaling of rotary embeddings, no sliding window of some architectures, no
soft caps and no biases, and it initialises at random what it does not find. Here the config gets all of these before
the weights are loaded, and a file that states more than the config can is refused.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.files import pointer_fault
from tlcapture.models.checkpoints.untaken import listed

_ROPE_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_FLAT_ROPE = (
    "falcon", "gemma2", "llama", "nemotron", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm",
    "starcoder2",
)  # fmt: skip
_READ_BY_TRANSFORMERS = ("gpt_oss",)  # architectures whose rotary scaling transformers reads itself
_WINDOWED = ("phi3", "starcoder2")  # those whose config has a sliding window that transformers leaves out
_PARTLY_ROTATED = ("nemotron", "phi3", "stablelm")
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}  # Gemma models that scale attention by d_model / n_heads
# Tensors of rotary frequencies, which are read above, and of layers that predict tokens further on.
_NOT_WEIGHTS = re.compile(r"^rope_|\.attn_rot_embd\b|\.nextn\.")
# Llama-3's scaling: only its factor differs between models, and the file has it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_gguf(source: Path) -> Any:
    """The Hugging Face model of a GGUF file, dequantised.

    Raises:
        ModelError: the file lacks weights, or states what transformers does not compute from it.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = GGUFReader(source)
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise ModelError(f"{source}: one of {parts.contents()} parts: join them with 'llama-gguf-split --merge' first")
    file = _File(source, reader)
    options: dict[str, Any] = {"gguf_file": source.name}
    config = AutoConfig.from_pretrained(str(source.parent), **options)
    _complete(config, file)
    with redirect_stderr(io.StringIO()):  # the only way to suppress its progress bar
        model, found = AutoModelForCausalLM.from_pretrained(
            str(source.parent), config=config, output_loading_info=True, attn_implementation="eager", **options
        )
    if missing := sorted(found.get("missing_keys", ())):
        raise ModelError(f"{source}: it has no {listed(missing)}, which would be random: use the original weights")
    if untaken := _untaken(file, model):
        raise ModelError(f"{source}: it has weights that transformers does not load: {listed(untaken)}")
    # The weights are dequantised; `save_pretrained` requires that these attributes are removed.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def gguf_fault(source: Path) -> str | None:
    """What is wrong with a file that cannot be read as GGUF; `None` if nothing is known to be."""
    from gguf import GGUFReader

    size = source.stat().st_size
    with source.open("rb") as file:
        start = file.read(8)
    if not start.startswith(b"GGUF"):
        return pointer_fault(source) or f"{source}: not a GGUF file"
    if int.from_bytes(start[4:], "little") >= 2**16:  # the version
        return f"{source}: a GGUF file for big-endian machines, which is not read: use one that is little-endian"
    try:
        GGUFReader(source)
    except Exception:  # of many kinds
        return f"{source}: damaged or cut off ({size} bytes): fetch it again"
    return None


def _untaken(file: _File, model: Any) -> list[str]:
    """The names of tensors that no weight of the model was made of; without more numbers than it has, none are."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    weights = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    n_layers = model.config.num_hidden_layers
    # A layer that predicts tokens further on has the weights of an ordinary layer too.
    beyond = {_layer_of(name) for name in file.shapes if ".nextn." in name} - set(range(n_layers))
    known = {
        name: size
        for name, size in file.shapes.items()
        if not _NOT_WEIGHTS.search(name) and _layer_of(name) not in beyond
    }
    if sum(known.values()) <= sum(weights.values()):
        return []
    architecture = next(each for each, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(architecture, n_layers)
    taken = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
    return sorted(known.keys() - taken) or sorted(known)


def _layer_of(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


class _File:
    """Metadata and tensors of a GGUF file; `shapes` has the number of elements of each tensor."""

    def __init__(self, source: Path, reader: Any):
        self.source = source
        self._reader = reader
        self.architecture = str(reader.get_field("general.architecture").contents())
        self.shapes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}

    def value(self, name: str) -> Any:
        """A value of the architecture's metadata; `None` if the file does not have it."""
        field = self._reader.get_field(f"{self.architecture}.{name}")
        return None if field is None else field.contents()

    def names(self, start: str) -> list[str]:
        """The names of metadata that begin with a text."""
        prefix = f"{self.architecture}."
        return [name.removeprefix(prefix) for name in self._reader.fields if name.startswith(prefix + start)]

    def tensor(self, name: str) -> list[float]:
        """The numbers of a small tensor in float32."""
        return next(np.asarray(each.data, np.float32).tolist() for each in self._reader.tensors if each.name == name)

    def refused(self, what: str) -> ModelError:
        return ModelError(
            f"{self.source}: it states {what}, which is not read from GGUF files: use the original weights"
        )


def _complete(config: Any, file: _File) -> None:
    """Let a config state what its file does and transformers leaves out."""
    _complete_attention(config, file)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := file.value(name)) is not None:
            if not hasattr(config, name):
                raise file.refused(f"{name} {cap}")
            setattr(config, name, float(cap))
    for tensor, name in (("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_up.bias", "mlp_bias")):
        if tensor in file.shapes and hasattr(config, name):
            setattr(config, name, True)
    rope = _rope_of(config, file)
    if "original_max_position_embeddings" in rope and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]  # takes precedence
    if rope:
        parameters = config.rope_parameters
        (parameters["full_attention"] if config.model_type == "gemma3_text" else parameters).update(rope)


def _complete_attention(config: Any, file: _File) -> None:
    """Set the width of heads, the sliding window and the scale of attention scores."""
    kind = config.model_type
    width = file.value("attention.key_length")
    if width and kind in _FLAT_ROPE and hasattr(config, "head_dim"):
        config.head_dim = int(width)  # rather than d_model / n_heads, or the default of the config
    window = file.value("attention.sliding_window")
    if kind in _WINDOWED:
        config.sliding_window = window or None  # rather than the default of the config
    elif isinstance(window, int) and kind in _FLAT_ROPE and kind != "gemma2":
        if 0 < window < config.max_position_embeddings:
            raise file.refused(f"a sliding window of {window} tokens")
    if kind in _LAYERS_OF_27B:
        is_27b = config.num_hidden_layers == _LAYERS_OF_27B[kind]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim


def _rope_of(config: Any, file: _File) -> dict[str, Any]:
    """The entries of `rope_parameters` that a file states beyond its base."""
    kind = config.model_type
    rotated = file.value("rope.dimension_count")
    partial: dict[str, Any] = {}
    if kind in _PARTLY_ROTATED and rotated:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        partial["partial_rotary_factor"] = rotated / width
    return partial if kind in _READ_BY_TRANSFORMERS else {**partial, **_scaling_of(config, file)}


def _scaling_of(config: Any, file: _File) -> dict[str, Any]:
    """The scaling of rotary embeddings that a file states; empty without one. Raises `ModelError` for any other."""
    kind = file.value("rope.scaling.type") or ("linear" if file.value("rope.scale_linear") else "none")
    has_factors = {_LONG, _SHORT} <= file.shapes.keys()
    if kind == "none" and not has_factors and _ROPE_FREQS not in file.shapes:
        return {}
    refused = file.refused(f"rotary embeddings of type {'longrope' if has_factors else kind!r}")
    if config.model_type not in (*_FLAT_ROPE, "gemma3_text"):
        raise refused
    if has_factors and kind in ("none", "longrope"):
        return _longrope(file)
    if _ROPE_FREQS in file.shapes:
        return _llama3(config, file)
    known = {f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
    factor = file.value("rope.scaling.factor") or file.value("rope.scale_linear")
    if kind not in ("linear", "yarn") or not factor or set(file.names("rope.scaling.")) - known:
        raise refused
    original = file.value("rope.scaling.original_context_length")
    stated = {"original_max_position_embeddings": int(original)} if kind == "yarn" and original else {}
    return {"rope_type": kind, "factor": float(factor), **stated}


def _longrope(file: _File) -> dict[str, Any]:
    original = file.value("rope.scaling.original_context_length")
    if not original:
        raise file.refused("rotary embeddings of type 'longrope' without the original context length")
    factor = file.value("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "short_factor": file.tensor(_SHORT),
        "long_factor": file.tensor(_LONG),
        "original_max_position_embeddings": int(original),
        **({} if factor is None else {"attention_factor": float(factor)}),
    }


def _llama3(config: Any, file: _File) -> dict[str, Any]:
    """Llama-3's scaling, if it gives the factors by which a file divides the frequencies."""
    factors = np.array(file.tensor(_ROPE_FREQS))
    width, base = 2 * len(factors), float(config.rope_parameters["rope_theta"])
    turns = _LLAMA3["original_max_position_embeddings"] * base ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    factor = float(factors.max())
    if not np.allclose(factors, 1 / ((1 - share) / factor + share), rtol=1e-3):
        raise file.refused("rotary frequencies other than those of Llama 3")
    return {} if factor == 1 else {"rope_type": "llama3", "factor": factor, **_LLAMA3}
