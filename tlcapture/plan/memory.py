"""The memory that a prompt of a workload takes while it runs alone, apart from the model's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tlcapture.commands.capturing.memory_need import Sized, memory_need
from tlcapture.models.sizes import Measures
from tlcapture.plan.cost import Workload
from tlcapture.text import dtype_name


@dataclass(frozen=True)
class Memory:
    """Bytes by prompt, and the dtype they are for.

    Attributes:
        prompt: the memory of a prompt while it is captured.
        replayed: the memory when a saved capture is read again for attention or internals, some layers at a time;
            `None` if neither is wanted.
    """

    dtype: str
    prompt: int
    replayed: int | None


def memory_of(workload: Workload, measures: Measures, dtype: torch.dtype, device: str) -> Memory:
    """The memory of a workload's prompt on a kind of device (`cpu`, `cuda`)."""
    model = Sized(measures, dtype, torch.device(device))
    wanted = workload.options.outputs(measures.n_layers)
    n_tokens = workload.prompt_tokens + workload.options.max_new_tokens
    prompt = memory_need(model, wanted, workload.prompt_tokens, n_tokens).n_bytes
    again = memory_need(model, wanted, n_tokens, n_tokens, replay=True).n_bytes if wanted.needs_pass else None
    return Memory(dtype_name(dtype), prompt, again)
