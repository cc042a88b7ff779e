"""`nn.Linear` modules that compute their products as `products` does."""

from __future__ import annotations

from torch import Tensor, nn

from tlcapture.products import linear


class FastLinear(nn.Linear):
    """An `nn.Linear` whose outputs are equal up to rounding; with gradients it computes exactly as that does."""

    def forward(self, input: Tensor) -> Tensor:
        """Outputs `[..., out]` of inputs `[..., in]`."""
        return linear(input, self.weight, self.bias)


def make_linears_fast(module: nn.Module) -> None:
    """Turn all `nn.Linear` within a module into `FastLinear`, in place; instances of subclasses are not changed."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.__class__ = FastLinear
