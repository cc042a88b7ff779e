"""The typical norm of `residual_out` at a layer: the median over tokens. It is the unit in which a model is steered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.models.loading import Model
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import Residual, Trajectory
from tlcapture.views.hooks import hook

NORMS_MEASURED = (
    "the vectors have no typical norm of this model's residual stream, which 'tlcapture extract' stores: its median "
    "over the prompts' tokens is the unit of the coefficients (metadata: typical_norms)"
)


class TypicalNorms:
    """Collects the norms of tokens, layer by layer."""

    def __init__(self) -> None:
        self._norms: dict[int, list[Tensor]] = {}

    def add(self, layer: int, residual: Residual) -> None:
        """Add tokens, `[..., d_model]`."""
        self.add_norms(layer, norms_of(residual).cpu())

    def add_norms(self, layer: int, norms: Trajectory) -> None:
        """Add the norms of tokens, `[n_tokens]`, in main memory."""
        self._norms.setdefault(layer, []).append(norms)

    def medians(self) -> dict[int, float]:
        """The median of each layer; for an even number, the mean of the middle two."""
        return {
            layer: float(np.median(torch.cat(norms).double().numpy())) for layer, norms in sorted(self._norms.items())
        }


def norms_of(residual: Residual) -> Trajectory:
    """The norms of tokens `[..., d_model]` in float32, as `[n_tokens]` on their device."""
    return residual.float().norm(dim=-1).flatten()


def norms_over_prompts(
    model: Model, prompts: Sequence[TokenizedPrompt], layers: Sequence[int], batch_size: int | None = None
) -> Mapping[int, float]:
    """The typical norms over all tokens of prompts without their responses, by layer.

    Prompts that the model cannot run are left out.
    """
    prompts = [replace(prompt, forced=None, given=None) for prompt in prompts]
    found, hooks = TypicalNorms(), {layer: hook("residual_out", layer) for layer in layers}
    for outcome in generate(model, prompts, hooks=list(hooks.values()), max_new_tokens=0, batch_size=batch_size):
        if not isinstance(outcome, Failure):
            for layer, name in hooks.items():
                found.add(layer, outcome.cache[name])
    return found.medians()
