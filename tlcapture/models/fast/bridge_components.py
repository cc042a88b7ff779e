"""Components of a TransformerBridge without the work whose results are not used; outputs are bit-identical.

Left out are calls of hook points without hooks, the scale and the normalised input of a norm while they have no hooks,
the checks in each pass of which arguments a block takes and of the names of its hooks, hooks that only record, and the
move of offloaded weights if none are offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

_RECORDS = "_tlcapture_records"  # the attribute of a point that says where to record, under which names,
_OFFERED = "_tlcapture_offered"  # and that of a bridge with the names of the only hooks that a pass has to look at
_OUTER_POINTS = ("hook_in", "hook_out")
_CHANGES_OF_ATTENTION = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in")  # of its config
_CAPTURES_OF_BLOCKS = ("_capture_pre_ln1", "_capture_mlp_in")


class _Fast:
    """Calls a component as any module, unless accelerate moves weights for it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = self._modules.get("_original_component")
        if original is None or "_hf_hook" in vars(original):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return nn.Module.__call__(self, *args, **kwargs)


class _FastPoint:
    """Passes on what it gets while it has no hooks, without a module's call: there are some forty in each layer.

    Where it is told to, it records what it passes on, after its hooks.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_idle = len(args) == 1 and not kwargs and not _is_hooked(self)
        passed = args[0] if is_idle else super().__call__(*args, **kwargs)  # type: ignore[misc]
        if _RECORDS in vars(self):
            cache, names = vars(self)[_RECORDS]
            first = passed[0] if isinstance(passed, tuple) else passed
            cache.update(dict.fromkeys(names, first.detach()))
        return passed


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
        return not any(_is_hooked(each) or _RECORDS in vars(each) for each in (self.hook_scale, self.hook_normalized))


class _FastAttention(_Fast):
    """Calls Hugging Face's attention while only the hook points around it and of its linear modules have hooks.

    TransformerLens computes attention itself, so that scores and patterns have hook points, and takes twice the time.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_changed():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        modules = self._modules
        if args:
            args = (modules["hook_in"](args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = modules["hook_in"](kwargs["hidden_states"])
        output, *others = modules["_original_component"].forward(*args, **kwargs)
        return (modules["hook_out"](output), *others)

    def _is_changed(self: Any) -> bool:
        if self.compatibility_mode or _changes_attention(self.config):
            return True
        modules = self._modules
        n_modules, points = vars(self).get("_inner_points", (0, []))
        if n_modules != len(modules):
            points = [
                each for name, each in modules.items() if isinstance(each, _FastPoint) and name not in _OUTER_POINTS
            ]
            vars(self)["_inner_points"] = (len(modules), points)
        return any(map(_is_used, points))


class RoundRotated:
    """A hook before `hook_rot_q` or `hook_rot_k` that gives the model's dtype to what TransformerLens rotated."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def __call__(self, point: nn.Module, args: tuple[Tensor]) -> Tensor:
        """What goes on to the hook point."""
        return args[0].to(self._dtype)


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
def recording(bridge: Any, names: Set[str]) -> Iterator[dict[str, Tensor]]:
    """Within this context, the hook points of a fast bridge record what they pass on, and it names no others.

    Adding a hook to each point in each pass and looking through all names takes longer than to record.

    Args:
        bridge: a TransformerBridge.
        names: the hooks whose activations are wanted.

    Returns:
        The activations by name, filled by a pass. Those of a bridge that is not fast, and those that TransformerLens
        converts, are left to `run_with_cache`.
    """
    cache: dict[str, Tensor] = {}
    if not isinstance(bridge, _FastBridge):
        yield cache
        return
    found = bridge.hook_dict
    recorded: dict[Any, list[str]] = {}
    for name in names & found.keys():
        if isinstance(found[name], _FastPoint) and found[name].hook_conversion is None:
            recorded.setdefault(found[name], []).append(name)
    others = (names & found.keys()).difference(*recorded.values())
    try:
        for point, named in recorded.items():
            vars(point)[_RECORDS] = (cache, named)
        vars(bridge)[_OFFERED] = others
        yield cache
    finally:
        vars(bridge).pop(_OFFERED, None)
        for point in recorded:
            vars(point).pop(_RECORDS, None)


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
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge,
    )

    if isinstance(component, NormalizationBridge):
        return _FastNorm
    if type(component) is LinearBridge:
        return _FastLinear
    if type(component) is PositionEmbeddingsAttentionBridge:
        return _FastAttention
    if isinstance(component, BlockBridge):
        return _OpenBlock if _takes_any(component.original_component) else _FastBlock
    return _Fast


@cache
def _faster(component: Any, kind: Any) -> Any:
    return type(component.__name__, (kind, component), {"__module__": component.__module__})


def _is_hooked(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _is_used(point: nn.Module) -> bool:
    """Whether a point records, or has hooks other than `RoundRotated`."""
    if _RECORDS in vars(point) or not _is_hooked(point):
        return _RECORDS in vars(point)
    return bool(
        any(not isinstance(each, RoundRotated) for each in point._forward_pre_hooks.values())
        or point._forward_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )


def _changes_attention(config: Any) -> bool:
    return any(getattr(config, name, False) for name in _CHANGES_OF_ATTENTION)


def _has_idle_hooks(component: Any) -> bool:
    """Whether all hooks of a component are those by which a block keeps what an option needs that is not set."""
    if not _is_hooked(component):
        return True
    named = [getattr(each, "__name__", "") for each in component._forward_pre_hooks.values()]
    others = component._forward_hooks or component._backward_hooks or component._backward_pre_hooks
    return not (others or set(named) - set(_CAPTURES_OF_BLOCKS) or _changes_attention(component.config))


def _takes_any(module: Any) -> bool:
    """Whether the forward pass of a module takes arguments of any name."""
    try:
        parameters = signature(module.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return False
    return any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
