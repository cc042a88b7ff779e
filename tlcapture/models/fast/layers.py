"""The weights and hook points of TransformerLens's modules, as used by the fast forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    # TransformerLens has three names for the same function.
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


# Kinds of devices on which weights that multiply the same input do so in one product. On a CPU that saves 2 % of a
# step, but gives other bits than weights that do not lie together.
JOINED_ON = {"cuda"}


class HookPoints:
    """Calls the hooks of TransformerLens's hook points and keeps requested activations during a forward pass.

    Args:
        hook_dict: the model's hook points by name.
        wanted: names of the points whose activations to keep.
        kept: the dict in which activations are stored by name.
        caching_hooks: names of points and TransformerLens's caching functions, which are called like hooks.
        changes: names of points and hook functions that return another activation, called after the hooks of a point.
    """

    def __init__(
        self,
        hook_dict: Mapping[str, Any],
        wanted: Iterable[str] = (),
        kept: dict[str, Tensor] | None = None,
        caching_hooks: Iterable[tuple[str, Callable[..., Any]]] = (),
        changes: Iterable[tuple[str, Callable[..., Any]]] = (),
    ):
        self._wanted = {hook_dict[name]: name for name in wanted}
        self._kept = {} if kept is None else kept
        self._caching_hooks: dict[Any, list[Callable[..., Any]]] = {}
        for name, save in caching_hooks:
            self._caching_hooks.setdefault(hook_dict[name], []).append(save)
        self._changes: dict[Any, list[Callable[..., Any]]] = {}
        for name, change in changes:
            self._changes.setdefault(hook_dict[name], []).append(change)

    def is_used(self, point: Any) -> bool:
        """Whether the activation at a hook point is kept or passed to a hook."""
        is_kept = point in self._wanted or point in self._caching_hooks
        return is_kept or bool(point._forward_hooks) or point in self._changes

    def pass_through(self, point: Any, activation: Tensor) -> Tensor:
        """The activation after the hooks of a point have been applied to it; it is kept if requested."""
        if point._forward_hooks:
            activation = point(activation)
        if self._changes:
            for change in self._changes.get(point, ()):
                activation = change(activation, hook=point)
        if point in self._wanted:
            self._kept[self._wanted[point]] = activation
        if self._caching_hooks:
            for save in self._caching_hooks.get(point, ()):
                save(activation, hook=point)
        return activation

    def pass_part(self, point: Any, part: Tensor) -> Tensor:
        """Like `pass_through`, for a part of a larger tensor, which hooks and the cache get as a separate tensor."""
        return self.pass_through(point, part.contiguous() if self.is_used(point) else part)

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """The output of a norm, of the shape of `x`, `[..., d]`; uses torch's fused norm if no hook needs its scale."""
        # Hooks may have returned a residual stream of a wider dtype than that of the model.
        if self.is_used(norm.hook_scale) or self.is_used(norm.hook_normalized) or x.dtype != norm.weight.dtype:
            return self._unfused_norm(norm, x)
        if norm.bias is None:
            return functional.rms_norm(x, norm.shape, norm.weight, norm.eps)
        return functional.layer_norm(x, norm.shape, norm.weight, norm.bias, norm.eps)

    def _unfused_norm(self, norm: Norm, x: Tensor) -> Tensor:
        # TransformerLens flattens queries and keys to `[batch * pos * head, d_head]` before their norms.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide.flatten(0, -2) if x.ndim > 3 else wide
        if norm.bias is not None:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = self.pass_through(norm.hook_scale, (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt())
        normed = self.pass_through(norm.hook_normalized, wide / scale).to(norm.weight.dtype) * norm.weight
        return (normed if norm.bias is None else normed + norm.bias).view(x.shape)


class Norm:
    """Weights and hook points of a norm as plain attributes, which are faster than those of a module."""

    def __init__(self, norm: Any):
        self.weight: Tensor = norm.w
        self.bias: Tensor | None = norm._parameters.get("b")
        self.shape = norm.w.shape
        self.eps = float(norm.eps)
        self.hook_scale = norm.hook_scale
        self.hook_normalized = norm.hook_normalized


class Biases:
    """Which biases of a model's blocks are zero, which takes one read from its device.

    Biases(tl.blocks).or_none(block.mlp.b_in)  # `None` if it is zero
    """

    def __init__(self, blocks: Iterable[Any]):
        alike: dict[torch.Size, list[Tensor]] = {}
        for block in blocks:
            into_heads = [getattr(block.attn, bias) for _, bias in _into_heads(block.attn)]
            for bias in (*into_heads, block.attn.b_O, block.mlp.b_in, block.mlp.b_out):
                alike.setdefault(bias.shape, []).append(bias)
        biases = [bias for same in alike.values() for bias in same]
        has_any = [torch.stack(same).flatten(1).any(dim=1) for same in alike.values()]
        read = torch.cat(has_any).cpu() if has_any else ()
        self._is_zero = {id(bias): not found for bias, found in zip(biases, read, strict=True)}

    def are_zero(self, biases: Iterable[Tensor]) -> bool:
        """Whether all of these parameters are zero."""
        return all(self._is_zero[id(bias)] for bias in biases)

    def or_none(self, bias: Tensor) -> Tensor | None:
        """A parameter, or `None` if it is zero."""
        return None if self._is_zero[id(bias)] else bias


class Layer:
    """Weights and hook points of a block as plain attributes.

    Weights are `[out, in]`: views of the block's parameters, whose memory layout allows them without a copy. Biases
    that are zero are `None`.
    """

    def __init__(self, block: Any, biases: Biases):
        from transformer_lens.utilities import SUPPORTED_ACTIVATIONS

        attn, mlp = block.attn, block.mlp
        self.attn = attn
        self.kind: str = attn.attn_type
        self.cap = float(attn.cfg.attn_scores_soft_cap)
        names = _into_heads(attn)
        weights = [getattr(attn, weight).permute(0, 2, 1).flatten(0, 1) for weight, _ in names]
        own = [getattr(attn, bias) for _, bias in names]
        found = [None if biases.or_none(bias) is None else bias.flatten() for bias in own]
        self.query, self.key, self.value = zip(weights, found, strict=True)
        self.qkv = _joined_product(weights, None if biases.are_zero(own) else [bias.flatten() for bias in own])
        self.out = (attn.W_O.permute(2, 0, 1).flatten(1), biases.or_none(attn.b_O))
        # A fused version if the block uses a known activation; a custom one may have parameters of its own.
        fast = _ACTIVATIONS.get(mlp.cfg.act_fn) if mlp.act_fn is SUPPORTED_ACTIVATIONS.get(mlp.cfg.act_fn) else None
        self.activate = fast or mlp.act_fn
        self.activation_is_new_tensor = fast is not None  # it may be written to in place
        self.mlp_gate: Tensor | None = mlp.W_gate.T if mlp.cfg.gated_mlp else None
        self.mlp_in = (mlp.W_in.T, biases.or_none(mlp.b_in))
        joins = self.mlp_gate is not None and self.mlp_gate.device.type in JOINED_ON
        self.gate_and_in = joined([mlp.W_gate.T, self.mlp_in[0]]) if joins else None
        self.mlp_out = (mlp.W_out.T, biases.or_none(mlp.b_out))
        both_sides = block.cfg.use_normalization_before_and_after
        self.ln1, self.ln2 = Norm(block.ln1), Norm(block.ln2)
        self.ln1_post = Norm(block.ln1_post) if both_sides else None
        self.ln2_post = Norm(block.ln2_post) if both_sides else None
        self.qk_norms = None if attn.q_norm is None else (Norm(attn.q_norm), Norm(attn.k_norm))
        self.hook_resid_pre, self.hook_resid_post = block.hook_resid_pre, block.hook_resid_post
        self.hook_resid_mid = None if block.cfg.parallel_attn_mlp else block.hook_resid_mid
        self.hook_attn_out, self.hook_mlp_out = block.hook_attn_out, block.hook_mlp_out
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = attn.hook_q, attn.hook_k, attn.hook_v, attn.hook_z
        self.hook_rot_q, self.hook_rot_k = getattr(attn, "hook_rot_q", None), getattr(attn, "hook_rot_k", None)
        self.hook_attn_scores, self.hook_pattern = attn.hook_attn_scores, attn.hook_pattern
        self.hook_pre, self.hook_post = mlp.hook_pre, mlp.hook_post
        self.hook_pre_linear = getattr(mlp, "hook_pre_linear", None)


def identity(value: Any) -> Any:
    """A key that is equal for two layers, norms or other values if a step recorded with one is valid for the other."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, (Layer, Norm)):
        return identity(tuple(vars(value).values()))
    return tuple(map(identity, value)) if isinstance(value, tuple) else value


def _into_heads(attn: Any) -> Sequence[tuple[str, str]]:
    """The names of the weights and biases of queries, keys and values."""
    grouped = "_" if "_W_K" in attn._parameters else ""
    return ("W_Q", "b_Q"), (f"{grouped}W_K", f"{grouped}b_K"), (f"{grouped}W_V", f"{grouped}b_V")


def _joined_product(weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> tuple[Tensor, Tensor | None] | None:
    """One weight and bias for several products of the same input; `None` if they do not lie together."""
    weight = joined(weights) if weights[0].device.type in JOINED_ON else None
    if weight is None or biases is None:
        return None if weight is None else (weight, None)
    bias = joined(biases)
    return None if bias is None else (weight, bias)


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Adjacent tensors in memory as one, along the first axis; `None` if they are not adjacent."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata and part.dtype == first.dtype
        if not same or not part.is_contiguous() or part.storage_offset() != end or part.shape[1:] != first.shape[1:]:
            return None
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def beside(q: Tensor, k: Tensor) -> Tensor | None:
    """Queries and keys `[batch, pos, head, d_head]` as one tensor, if they are adjacent in each row of a larger one."""
    follows = k.storage_offset() == q.storage_offset() + q.shape[2] * q.shape[3] and q.stride() == k.stride()
    if not follows or q.untyped_storage()._cdata != k.untyped_storage()._cdata or q.stride(2) != q.shape[3]:
        return None
    return q.as_strided((*q.shape[:2], q.shape[2] + k.shape[2], q.shape[3]), q.stride())
