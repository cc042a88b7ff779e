"""The names of the key-value cache in calls between TransformerLens and transformers.

transformers 5.24 renamed `past_key_values` and `cache_params` to `cache`. TransformerLens (up to 4.3) knows only the old
names: its attention then runs without the earlier positions. Here each of its components finds the cache under every
name, and the modules of transformers get the name that they take.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn

_NEW = "cache"
_OLD = ("past_key_values", "cache_params")


def share_cache_names(original_model: nn.Module) -> None:
    """Let a bridged Hugging Face model and its TransformerLens components call the cache by different names.

    Does nothing for models whose modules take `past_key_values`, as all do before transformers 5.24.
    """
    takes_new = [module for module in original_model.modules() if _takes_new_name(module)]
    components = [module for module in original_model.modules() if _takes_new_name(_wrapped(module))]
    for module in takes_new:
        module.register_forward_pre_hook(_only_the_new_name, with_kwargs=True)
    for component in components:
        component.register_forward_pre_hook(_every_name, with_kwargs=True)
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
