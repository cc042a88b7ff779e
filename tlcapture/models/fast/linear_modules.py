"""`nn.Linear` modules that compute products of few rows as `products` does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlcapture.models.fast.products import linear, wide_linear

_WIDE = 16_384  # output features from which a weight counts as wide as a vocabulary


class FastLinear(nn.Linear):
    """An `nn.Linear` whose outputs are equal up to rounding; with gradients it computes exactly as that does."""

    def forward(self, input: Tensor) -> Tensor:
        """Outputs `[..., out]` of inputs `[..., in]`."""
        if torch.is_grad_enabled():
            return super().forward(input)
        if self.bias is None and len(self.weight) >= _WIDE:
            found = wide_linear(input.reshape(-1, self.in_features), self.weight)
            return found.view(*input.shape[:-1], self.out_features)
        return linear(input, self.weight, self.bias)


def make_linears_fast(module: nn.Module) -> None:
    """Turn all `nn.Linear` within a module into `FastLinear`, in place; instances of subclasses are not changed."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = FastLinear
