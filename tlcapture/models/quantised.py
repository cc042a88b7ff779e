"""Quantised checkpoints: which are loaded, and what the others need.

Where transformers can dequantise the weights, they are loaded dequantised. A model whose layers round activations to 8
bits as well is then computed without that rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from tlcapture.errors import ModelError

# Method -> the class of transformers that dequantises its weights while they are loaded.
_WHILE_LOADING = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
_AFTERWARDS = ("bitsandbytes",)  # methods whose weights transformers dequantises once they are loaded
# Method -> modules that transformers imports for it, and the name to install where it is another one.
_NEEDS: dict[str, tuple[str, ...]] = {
    "fp8": ("accelerate",),
    "mxfp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("accelerate", "gptqmodel"),
    "auto-round": ("auto_round",),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
    "quark": ("quark",),
    "torchao": ("torchao",),
    "aqlm": ("accelerate", "aqlm"),
    "vptq": ("accelerate", "vptq"),
    "higgs": ("accelerate", "flute", "fast_hadamard_transform"),
    "eetq": ("accelerate", "kernels"),
    "fbgemm_fp8": ("accelerate", "fbgemm_gpu"),
    "bitnet": ("accelerate",),
    "spqr": ("accelerate", "spqr_quant"),
    "fp_quant": ("fp_quant",),
    "nvfp4": ("kernels",),
    "sinq": ("sinq",),
}
_INSTALLED_AS = {
    "auto_round": "auto-round",
    "compressed_tensors": "compressed-tensors",
    "fbgemm_gpu": "fbgemm-gpu",
    "flute": "flute-kernel",
    "optimum.quanto": "optimum-quanto",
    "quark": "amd-quark",
}


_SCALES = frozenset(
    ["weight_scale", "weight_scale_inv", "scales", "qweight", "qzeros", "absmax", "SCB", "weight_packed", "quant_map"]
)


def method_of(config: Any) -> str | None:
    """The quantisation method in a Hugging Face config; `None` for weights that are not quantised."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    fields = found if isinstance(found, dict) else found.to_dict()
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    method = fields.get("quant_method")
    return str(getattr(method, "value", method))


def is_dequantised(config: Any) -> bool:
    """Whether the weights of a quantised checkpoint are dequantised on loading."""
    return method_of(config) in (*_WHILE_LOADING, *_AFTERWARDS)


def loading_options(config: Any, name: str) -> dict[str, Any]:
    """Options of `from_pretrained` for a checkpoint, which dequantise its weights where transformers can.

    Raises `ModelError`, with the packages to install, for a method that is unknown or needs packages that are missing.
    """
    method = method_of(config)
    if method is None:
        return {}
    if method not in _NEEDS:
        # transformers would take such weights for unquantised ones.
        raise ModelError(
            f"model {name!r} is quantised by the method {method!r}: expected weights that are not quantised, or one of "
            f"{', '.join(sorted(_NEEDS))}"
        )
    missing = [_INSTALLED_AS.get(module, module) for module in _NEEDS[method] if not _is_installed(module)]
    if missing:
        raise ModelError(
            f"model {name!r} is quantised by the method {method!r}, which needs packages that are not installed: "
            f"run 'pip install {' '.join(missing)}', or use weights that are not quantised"
        )
    if method not in _WHILE_LOADING:
        return {}
    import transformers

    return {"quantization_config": getattr(transformers, _WHILE_LOADING[method])(dequantize=True)}


def dequantised(model: Any, config: Any) -> Any:
    """A Hugging Face model, loaded with `loading_options`, without quantisation; unchanged if it stays quantised."""
    if not is_dequantised(config):
        return model
    if method_of(config) in _AFTERWARDS:
        model = model.dequantize(dtype=model.dtype)
    model.hf_quantizer = None
    model.is_quantized = False
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return model


def are_scales(names: Sequence[str]) -> bool:
    """Whether names of weights are those of quantised ones, which mean something else without their scales."""
    return any(name.rpartition(".")[2] in _SCALES for name in names)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False
