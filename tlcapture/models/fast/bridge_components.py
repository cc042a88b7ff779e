"""Components of a TransformerBridge without the work whose results are not used; outputs are bit-identical.

Left out are calls of hook points without hooks, the scale and the normalised input of a norm while they have no hooks,
the checks in each pass of which arguments a block takes and of the names of its hooks, the names of hooks that nobody
asked for, and the move of offloaded weights if none are offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

_OFFERED = "_tlcapture_offered"  # the attribute of a bridge with the names of the only hooks that a pass looks at
# Options of TransformerLens that need what blocks keep by hooks before norms, and these hooks.
_NEEDS_CAPTURES = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")
_CAPTURES_OF_BLOCKS = ("_capture_pre_ln1", "_capture_mlp_in")


class _Fast:
    """Calls a component as any module, unless accelerate moves weights for it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = self._modules.get("_original_component")
        if original is None or "_hf_hook" in vars(original):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return nn.Module.__call__(self, *args, **kwargs)


class _FastPoint:
    """Passes on what it gets while it has no hooks, without a module's call: there are some forty in each layer."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or _is_hooked(self):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return args[0]


class _FastLinear(_Fast):
    """Calls the linear module between its two hook points."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or _is_hooked(self) or self._suppress_next_hook_in:
            return super().__call__(*args, **kwargs)
        modules = self._modules
        output = modules["hook_out"](modules["_original_component"](modules["hook_in"](args[0])))
        vars(self)["_fired_hook_out"] = True  # which TransformerLens asks for after an MLP
        return output


class _FastNorm(_Fast):
    """Computes Hugging Face's norm alone while its hook points have no hooks."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = self._modules
        native = modules.get("_original_component")
        if len(args) != 1 or kwargs or native is None or not self._is_native() or not _has_idle_hooks(self):
            return super().__call__(*args, **kwargs)
        x = modules["hook_in"](args[0])
        return modules["hook_out"](native(x).to(x.dtype))

    def _hf_autograd_forward_with_hooks(self: Any, x: Tensor) -> Tensor:
        native = self.original_component
        if native is None or isinstance(native, nn.Identity) or not self._is_unseen():
            return super()._hf_autograd_forward_with_hooks(x)  # type: ignore[misc]
        return native(x).to(x.dtype)

    def _is_native(self: Any) -> bool:
        chosen = self.use_native_layernorm_autograd or getattr(self.config, "layer_norm_folding", False)
        return bool(chosen) and type(self._modules["_original_component"]) is not nn.Identity and self._is_unseen()

    def _is_unseen(self: Any) -> bool:
        return not (_is_hooked(self.hook_scale) or _is_hooked(self.hook_normalized))


class _FastBlock(_Fast):
    """Does not look in each pass for the norm that attention may start from, nor forget its input that nobody kept."""

    def _wire_ln1_module(self: Any) -> None:
        attn, norm = (self.submodules.get(name) for name in ("attn", "ln1"))
        if attn is None or norm is None or vars(attn).get("_ln1_module") is not norm.original_component:
            super()._wire_ln1_module()  # type: ignore[misc]

    def _clear_attention_capture(self: Any) -> None:
        attn = self.submodules.get("attn")
        if attn is not None and vars(attn).get("_captured_pre_ln_residual", attn) is not None:
            super()._clear_attention_capture()  # type: ignore[misc]


class _OpenBlock(_FastBlock):
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
        names = vars(self).get(_OFFERED)
        return dict(found[1]) if names is None else {name: found[1][name] for name in names}


@contextmanager
def offering_only(bridge: Any, names: Set[str]) -> Iterator[None]:
    """Within this context, a fast bridge names these hooks only: `run_with_cache` looks at each name three times."""
    if not isinstance(bridge, _FastBridge):
        yield
        return
    vars(bridge)[_OFFERED] = names & bridge.hook_dict.keys()
    try:
        yield
    finally:
        del vars(bridge)[_OFFERED]


def make_components_fast(bridge: Any) -> None:
    """Give a TransformerBridge and its components faster classes, in place."""
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for each in bridge.modules():
        if type(each) is HookPoint:
            each.__class__ = _faster(HookPoint, _FastPoint)  # type: ignore[arg-type]
        elif isinstance(each, GeneralizedComponent) and not isinstance(each, _Fast):
            each.__class__ = _faster(type(each), _kind(each))  # type: ignore[arg-type]
    if not isinstance(bridge, _FastBridge):
        bridge.__class__ = _faster(type(bridge), _FastBridge)  # type: ignore[arg-type]


def _kind(component: Any) -> type[_Fast]:
    from transformer_lens.model_bridge.generalized_components import BlockBridge, LinearBridge, NormalizationBridge

    if isinstance(component, NormalizationBridge):
        return _FastNorm
    if type(component) is LinearBridge:
        return _FastLinear
    if isinstance(component, BlockBridge):
        return _OpenBlock if _takes_any(component.original_component) else _FastBlock
    return _Fast


@cache
def _faster(component: Any, kind: Any) -> Any:
    return type(component.__name__, (kind, component), {"__module__": component.__module__})


def _is_hooked(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _needs_captures(config: Any) -> bool:
    return any(getattr(config, name, False) for name in _NEEDS_CAPTURES)


def _has_idle_hooks(component: Any) -> bool:
    """Whether all hooks of a component are those by which a block keeps what an option needs that is not set."""
    if not _is_hooked(component):
        return True
    named = [getattr(each, "__name__", "") for each in component._forward_pre_hooks.values()]
    others = component._forward_hooks or component._backward_hooks or component._backward_pre_hooks
    return not (others or set(named) - set(_CAPTURES_OF_BLOCKS) or _needs_captures(component.config))


def _takes_any(module: Any) -> bool:
    """Whether the forward pass of a module takes arguments of any name."""
    try:
        parameters = signature(module.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    return any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
