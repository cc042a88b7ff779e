"""HookedTransformer's parameters in the memory layout its linear calls ask for.

TransformerLens multiplies with `F.linear(x, W.T.contiguous())`, so that results equal Hugging Face's
bit for bit. With parameters in row-major order that copies every weight at every step. Here a
parameter keeps its shape but lies in memory as its transpose: `.contiguous()` then returns the
parameter's own memory, and the outputs stay the same bits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Parameter's last name -> the order of its axes in which memory must run.
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
    """The order of axes in which the parameter `name` should lie in memory."""
    *_, module, last = ("", *name.split("."))
    if module == "attn" and last in _ATTENTION and weight.ndim == 3:
        return _ATTENTION[last]
    # The plain MLP multiplies with addmm, which takes its weights as they are.
    if module == "unembed" or (module == "mlp" and gated_mlp):
        if weight.ndim == 2:
            return _MATRIX
    return tuple(range(weight.ndim))


def lay_out(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values and shape, with memory running in `order`; no copy where it already does."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return weight.permute(order).contiguous().permute(inverse)


def lay_out_in_place(module: Any) -> None:
    """Lay out the parameters of a HookedTransformer that is there already; their shapes and values stay."""
    gated = bool(module.cfg.gated_mlp)
    for name, parameter in module.named_parameters():
        parameter.data = lay_out(parameter.data, memory_order(name, parameter, gated_mlp=gated))
