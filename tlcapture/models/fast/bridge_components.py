"""Components of a TransformerBridge without the work whose results are not used; outputs are bit-identical.

Left out are the scale and the normalised input of a norm while they have no hooks, the checks in each pass of which
arguments a block takes and of the names of its hooks, and the move of offloaded weights if none are offloaded.
"""

from __future__ import annotations

from functools import cache
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn


class _Fast:
    """Calls a component as any module, unless accelerate moves weights for it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = self._modules.get("_original_component")
        if original is None or "_hf_hook" in vars(original):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return nn.Module.__call__(self, *args, **kwargs)


class _FastNorm(_Fast):
    """Computes Hugging Face's norm alone while its hook points have no hooks."""

    def _hf_autograd_forward_with_hooks(self: Any, x: Tensor) -> Tensor:
        native = self.original_component
        points = (self.hook_scale, self.hook_normalized)
        if native is None or isinstance(native, nn.Identity) or any(map(_is_hooked, points)):
            return super()._hf_autograd_forward_with_hooks(x)  # type: ignore[misc]
        return native(x).to(x.dtype)


class _FastBlock(_Fast):
    """Passes all arguments to a block that takes any."""

    def _filter_kwargs_for_forward(self, kwargs: dict[str, Any], num_positional_args: int = 0) -> dict[str, Any]:
        return kwargs


class _FastBridge:
    """Resolves the other names of its hooks, which each pass asks for several times, once for the same hooks."""

    @property
    def hook_dict(self: Any) -> dict[str, Any]:
        found = vars(self).get("_found_hooks")
        if found is None or found[0] != self._hook_registry:
            found = vars(self)["_found_hooks"] = (dict(self._hook_registry), super().hook_dict)  # type: ignore[misc]
        return dict(found[1])


def make_components_fast(bridge: Any) -> None:
    """Give a TransformerBridge and its components faster classes, in place."""
    from transformer_lens.model_bridge.generalized_components import BlockBridge, NormalizationBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for each in bridge.modules():
        if isinstance(each, GeneralizedComponent) and not isinstance(each, _Fast):
            is_open_block = isinstance(each, BlockBridge) and _takes_any(each.original_component)
            kind = _FastNorm if isinstance(each, NormalizationBridge) else _FastBlock if is_open_block else _Fast
            each.__class__ = _faster(type(each), kind)  # type: ignore[arg-type]
    if not isinstance(bridge, _FastBridge):
        bridge.__class__ = _faster(type(bridge), _FastBridge)  # type: ignore[arg-type]


@cache
def _faster(component: Any, kind: Any) -> Any:
    return type(component.__name__, (kind, component), {"__module__": component.__module__})


def _is_hooked(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _takes_any(module: Any) -> bool:
    """Whether the forward pass of a module takes arguments of any name."""
    try:
        parameters = signature(module.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    return any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
