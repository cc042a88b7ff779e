"""Changes of transformers 5.24 that TransformerLens's components do not support yet.

The key-value cache has another name: `past_key_values` and `cache_params` became `cache`. TransformerLens (up to 4.3)
looks for the old names only, so that its attention would run without the earlier positions. Here each of its components
finds the cache under every name, and the modules of transformers get the name that they take.

The cache keeps the dtypes of keys and values apart. TransformerLens leaves keys rotated by float32 angles (OLMo-2) in
float32, next to values in 16 bits. Here they return to the model's dtype, as in transformers.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn

_NEW = "cache"
_OLD = ("past_key_values", "cache_params")
_ROTATED = ("hook_rot_q", "hook_rot_k")


def support_newer_transformers(original_model: nn.Module, dtype: torch.dtype) -> None:
    """Adapt the TransformerLens components in a bridged Hugging Face model, whose weights have the given dtype."""
    modules = list(original_model.modules())
    takes_new = [module for module in modules if _takes_new_name(module)]
    for module in takes_new:
        module.register_forward_pre_hook(_only_the_new_name, with_kwargs=True)
    for module in modules:
        if _takes_new_name(_wrapped(module)):
            module.register_forward_pre_hook(_every_name, with_kwargs=True)
        for name in _ROTATED:
            if name in module._modules:
                module.get_submodule(name).register_forward_pre_hook(lambda hook, args: args[0].to(dtype))
    if takes_new:
        logging.getLogger("transformers.utils.generic").addFilter(_is_not_about_the_names)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module of transformers that a TransformerLens component stands for; `None` for any other module."""
    return module._modules.get("_original_component")


def _takes_new_name(module: nn.Module | None) -> bool:
    return module is not None and _wrapped(module) is None and _NEW in inspect.signature(module.forward).parameters


def _every_name(component: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**dict.fromkeys(_OLD, options[_NEW]), **options} if _NEW in options else options


def _only_the_new_name(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    given = [options.get(name) for name in (_NEW, *_OLD)]
    others = {name: value for name, value in options.items() if name not in (_NEW, *_OLD)}
    cache = next((each for each in given if each is not None), None)
    return args, others if cache is None else {**others, _NEW: cache}


def _is_not_about_the_names(record: logging.LogRecord) -> bool:
    """Drop transformers' advice to use the new name: it concerns TransformerLens's code, not the user's."""
    return not record.getMessage().startswith("`past_key_values`/`cache_params` are deprecated")
