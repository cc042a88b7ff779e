"""The forward pass of a HookedTransformer, computed with less work between its matrix products.

    fast = FastForward(hooked)
    state = FastState.empty(batch_size)
    residual = fast(tokens, mask, state)           # all hook points of the blocks have fired

The same parameters, the same hook points with the same tensors, the same values to float tolerance; a
reader who wants to know what is computed can skip this module and read TransformerLens. What differs:
keys are rotated once and kept rotated, in buffers that are written to in place; grouped keys and values
are never repeated; attention is fused unless somebody watches its scores or pattern; masks, positions
and rotary tables are made once a step, not once a layer; products of few rows take another way (`products`);
and a hook point that nobody hooked is not called. `load_model(..., fast=False)` and the environment variable
`TLCAPTURE_FAST=0` switch it off.
"""

from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.state import FastState

__all__ = ["FastForward", "FastState"]
