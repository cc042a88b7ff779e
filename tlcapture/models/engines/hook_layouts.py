"""The layouts of a TransformerBridge's activations: which axes count prompts and tokens, and what a hook holds.

Most hooks hold `[batch, pos, ...]`. Latent attention (DeepSeek) has `[batch, head, pos, d_head]`, routers of experts
have `[batch * pos, n_experts]`; some hold nothing by token. Two passes with different numbers of prompts and tokens
tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tlcapture.views.hooks import hook

# Axes of `[batch, pos, ...]`, `[batch, head, pos, d_head]` and `[batch * pos, ...]`.
PLAIN, BY_HEAD, FLAT = "plain", "by head", "flat"
_PROBES = ((1, 5), (2, 6))  # numbers of prompts and of tokens
_IN_PATH = re.compile(r"\.(\d+)\.")

Shape = tuple[int, ...]


def layouts(shapes_of: Callable[[int, int], Mapping[str, Shape]]) -> dict[str, str]:
    """The layout of each hook whose activations are stored token by token.

    `shapes_of(n_prompts, n_tokens)` are the shapes of activations in a pass over that many prompts and tokens.
    """
    first, second = (shapes_of(*probe) for probe in _PROBES)
    found = {name: _layout(shape, second[name]) for name, shape in first.items()}
    return {name: layout for name, layout in found.items() if layout is not None}


def _layout(first: Shape, second: Shape) -> str | None:
    if len(first) != len(second):
        return None
    axes = list(zip(first, second, strict=True))
    (batch, pos), (flat,) = zip(*_PROBES, strict=True), [tuple(rows * columns for rows, columns in _PROBES)]
    changing = {axis: sizes for axis, sizes in enumerate(axes) if sizes[0] != sizes[1]}
    expected = {PLAIN: {0: batch, 1: pos}, BY_HEAD: {0: batch, 2: pos}, FLAT: {0: flat}}
    return next((name for name, sizes in expected.items() if sizes == changing), None)


def by_token(activation: Tensor, layout: str, n_prompts: int) -> Tensor:
    """An activation as `[batch, pos, ...]`."""
    if layout == BY_HEAD:
        return activation.transpose(1, 2)
    return activation.unflatten(0, (n_prompts, -1)) if layout == FLAT else activation


def recordable_hooks(hooks: Mapping[str, Any], n_layers: int) -> set[str]:
    """The names of the hooks of a bridge, without those that are another activation under a misleading name.

    For a block of experts, TransformerLens gives its input and output the names of the neurons of an MLP.
    """
    names = set(hooks)
    for layer in range(n_layers):
        for neurons, boundary in (("mlp_pre", "experts_in"), ("mlp_post", "experts_out")):
            alias, own = hook(neurons, layer), hook(boundary, layer)
            if own in hooks and hooks.get(alias) is hooks[own]:
                names.discard(alias)
        names.discard(hook("router_scores", layer))  # it never fires, or with the scores of the chosen experts only
    return names


def router_modules(hf_model: nn.Module) -> dict[int, tuple[nn.Module, int]]:
    """The routers of a Hugging Face model's experts by layer, and the index of the output that has the logits.

    These are the logits that Hugging Face records as `router_logits`.
    """
    recorded: list[Any] = []
    for module in hf_model.modules():
        declared = getattr(module, "_can_record_outputs", None) or {}
        entry = declared.get("router_logits") if isinstance(declared, Mapping) else None
        recorded += entry if isinstance(entry, list) else [entry] if entry is not None else []
    found: dict[int, tuple[nn.Module, int]] = {}
    for path, module in hf_model.named_modules():
        for recorder in recorded:
            layer = _IN_PATH.search(f".{path}.")
            if layer and isinstance(module, recorder.target_class) and "att" not in path:
                found[int(layer[1])] = (module, int(recorder.index or 0))
    return found


@contextmanager
def router_scores(routers: Mapping[str, tuple[nn.Module, int]], into: dict[str, Tensor]) -> Iterator[None]:
    """Record the logits of routers, by name, in the passes that run in the context."""

    def record(name: str, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            into[name] = output[index] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(record(name, index)) for name, (module, index) in routers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
