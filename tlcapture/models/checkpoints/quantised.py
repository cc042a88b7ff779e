"""Quantised checkpoints: which ones can be loaded, and what the others need.

Where transformers can dequantise the weights, they are loaded dequantised. A model whose layers round activations to 8
bits as well is then computed without that rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tlcapture.errors import ModelError, TlcaptureError
from tlcapture.models.checkpoints.files import PLAIN_TYPES
from tlcapture.models.checkpoints.untaken import is_known
from tlcapture.text import first_line
from tlcapture.version import installed

# Method -> the class of transformers that dequantises its weights while they are loaded.
_WHILE_LOADING = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
_AFTERWARDS = ("bitsandbytes", "torchao")  # methods whose weights are dequantised once they are loaded
# Methods that transformers knows, and whose checkpoints it does not load, whatever is installed.
_NOT_LOADED = ("hqq", "nvfp4")
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
    "sinq": ("sinq",),
    "fouroversix": ("fouroversix",),
    "metal": ("kernels",),
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
    # Like transformers, take the text part's config where the whole model has none.
    parts = (config, config.get_text_config(decoder=True))
    found = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
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


def forget(config: Any) -> None:
    """Remove the quantisation from the config of dequantised weights."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            part.quantization_config = None


def loading_options(config: Any, name: str) -> dict[str, Any]:
    """Options of `from_pretrained` for a checkpoint, which dequantise its weights where transformers can.

    Raises `ModelError`, with the packages to install, for a method that is unknown or needs packages that are missing.
    """
    method = method_of(config)
    if method is None:
        return {}
    if method in _NOT_LOADED:
        raise ModelError(
            f"model {name!r} is quantised by the method {method!r}, whose checkpoints transformers "
            f"{installed('transformers')} does not load: use weights that are not quantised"
        )
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
    if method_of(config) == "torchao":
        _dequantise_tensors(model)
    elif method_of(config) in _AFTERWARDS:
        model = model.dequantize(dtype=model.dtype)
    model.hf_quantizer = None
    model.is_quantized = False
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return model


@contextmanager
def refused_in_one_line(config: Any, name: str) -> Iterator[None]:
    """Turn every error with a model into a `ModelError` of one line, if its config states a quantisation."""
    try:
        yield
    except TlcaptureError:
        raise
    except Exception as error:
        method = method_of(config)
        if method is None:
            raise
        raise ModelError(
            f"model {name!r} is quantised by the method {method!r}, which does not run here: "
            f"{type(error).__name__}: {first_line(error)}: use weights that are not quantised"
        ) from None


def _dequantise_tensors(model: Any) -> None:
    """Replace weights of another tensor class, such as torchao's, by plain tensors."""
    from torch.nn import Parameter
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if is_traceable_wrapper_subclass(weight):
                plain = weight.detach().dequantize().to(model.dtype)
                setattr(module, name, Parameter(plain, requires_grad=False))


def are_scales(names: Sequence[str]) -> bool:
    """Whether names of weights belong to quantised weights, which mean something else without their scales."""
    return any(name.rpartition(".")[2] in _SCALES for name in names)


def of_other_types(types: Mapping[str, str], model: Any) -> list[str]:
    """The names, among stored weights with their types, of those that a model takes and that are not floating point.

    Integers and 8-bit numbers have no meaning without their scales.
    """
    taken = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return [
        f"{name} is {kind}"
        for name, kind in types.items()
        if kind not in PLAIN_TYPES.values() and name.rpartition(".")[2] in taken and not is_known(name)
    ]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False
