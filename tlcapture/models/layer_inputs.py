"""The inputs of a Hugging Face model's layers; for some architectures its `hidden_states` are something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def layer_inputs(hf_model: Any) -> Iterator[list[Tensor]]:
    """The input of each layer of a pass in the context, in order."""
    n_layers = getattr(hf_model.config.get_text_config(), "num_hidden_layers", 0)
    inputs: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        inputs.append((args[0] if args else options["hidden_states"]).detach())

    stacks = [each for each in hf_model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == n_layers]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for stack in stacks for layer in stack]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
