"""Store HookedTransformer's parameters in the memory layout that its linear layers need.

TransformerLens computes `F.linear(x, W.T.contiguous())`, so that results equal those of Hugging Face bit for bit. With
row-major parameters, this copies every weight at every step. Here, a parameter keeps its shape but is stored as its
transpose: `.contiguous()` then returns the parameter's own memory, and outputs are identical bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Last component of a parameter's name -> memory order of its axes, from slowest to fastest.
_HEADS_IN = (0, 2, 1)  # [head, d_model, d_head] -> (head d_head) d_model
_HEADS_OUT = (2, 0, 1)  # [head, d_head, d_model] -> d_model (head d_head)
_ATTENTION = {
    "W_Q": _HEADS_IN,
    "W_K": _HEADS_IN,
    "W_V": _HEADS_IN,
    "_W_K": _HEADS_IN,
    "_W_V": _HEADS_IN,
    "W_O": _HEADS_OUT,
}
_MATRIX = (1, 0)


def memory_order(name: str, weight: Tensor, *, gated_mlp: bool) -> tuple[int, ...]:
    """The memory order of the axes of the parameter `name`, from slowest to fastest."""
    *_, module, last = ("", *name.split("."))
    if module == "attn" and last in _ATTENTION and weight.ndim == 3:
        return _ATTENTION[last]
    # An MLP without a gate uses addmm, which needs row-major weights.
    if module == "unembed" or (module == "mlp" and gated_mlp):
        if weight.ndim == 2:
            return _MATRIX
    return tuple(range(weight.ndim))


def lay_out(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """A tensor with the values and shape of `weight`, stored in the memory order `order`; copied only if needed."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return weight.permute(order).contiguous().permute(inverse)


def laid_out_on(
    device: torch.device | str, dtype: torch.dtype, weights: Mapping[str, Tensor], *, gated_mlp: bool
) -> dict[str, Tensor]:
    """Parameters on a device, with floating-point ones in a dtype, each in its memory order.

    Parameters that are views of the same memory, as a tied embedding and unembedding, share it on the device too.
    """
    moved: dict[tuple[Any, ...], Tensor] = {}
    laid_out = {}
    for name, weight in weights.items():
        order = memory_order(name, weight, gated_mlp=gated_mlp)
        in_memory = weight.detach().permute(order)
        source = (in_memory.data_ptr(), in_memory.shape, in_memory.stride(), in_memory.dtype, in_memory.device)
        if source not in moved or not weight.numel():
            own = in_memory.to(device, dtype if weight.is_floating_point() else weight.dtype)
            moved[source] = own.contiguous()
        laid_out[name] = moved[source].permute(sorted(range(len(order)), key=order.__getitem__))
    return laid_out


def share_tables_in_place(hooked: Any) -> None:
    """Let the attention modules of a device that have equal rotary tables share one, as many as a model has layers."""
    known: dict[tuple[Any, ...], list[Tensor]] = {}
    for block in hooked.blocks:
        tables = block.attn._buffers
        for name in ("rotary_sin", "rotary_cos"):
            if (own := tables.get(name)) is None:
                continue
            alike = known.setdefault((name, own.shape, own.dtype, own.device), [])
            same = next((each for each in alike if torch.equal(each, own)), None)
            if same is None:
                alike.append(own)
            else:
                tables[name] = same


def lay_out_in_place(module: Any) -> None:
    """Change the memory layout of the parameters of a HookedTransformer in place; shapes and values stay the same."""
    gated = bool(module.cfg.gated_mlp)
    for name, parameter in module.named_parameters():
        parameter.data = lay_out(parameter.data, memory_order(name, parameter, gated_mlp=gated))


def join_in_place(hooked: Any) -> None:
    """Let weights that multiply the same input lie one after another in memory, so that one product can have all.

    They remain parameters of their own, with their shapes, values and order of axes in memory.
    """
    for block in hooked.blocks:
        attn, mlp = block.attn._parameters, block.mlp._parameters
        grouped = "_" if "_W_K" in attn else ""
        for kind in "Wb":
            _join(attn, [f"{kind}_Q", f"{grouped}{kind}_K", f"{grouped}{kind}_V"])
        _join(mlp, ["W_gate", "W_in"])


def _join(parameters: dict[str, Any], names: list[str]) -> None:
    found = [parameters[name] for name in names if parameters.get(name) is not None]
    if len(found) < len(names) or len({(each.device, each.dtype) for each in found}) > 1:
        return
    orders = [sorted(range(each.ndim), key=each.stride, reverse=True) for each in found]
    in_memory = [each.data.permute(order) for each, order in zip(found, orders, strict=True)]
    pieces = torch.cat([each.flatten() for each in in_memory]).split([each.numel() for each in found])
    for parameter, piece, laid_out, order in zip(found, pieces, in_memory, orders, strict=True):
        parameter.data = piece.view(laid_out.shape).permute(sorted(range(len(order)), key=order.__getitem__))
