"""HookedTransformer with a forward pass that does less work between its matrix products.

    hooked = FastHookedTransformer(cfg)                                # as created by `load_model`
    logits, cache = hooked.run_with_cache(tokens)                      # that of TransformerLens
    cache = FastCache.init_cache(hooked.cfg, hooked.cfg.device, 1)
    logits = hooked(tokens, past_kv_cache=cache)                       # decode token by token

`transformer.FastHookedTransformer` is a subclass whose `forward` runs `forward.FastForward` for supported calls and
that of TransformerLens for all others; `cache.FastCache` is its `past_kv_cache`. Both need a TransformerLens with
HookedTransformer, so they are imported lazily from their modules.

Parameters, hook points and the tensors at hook points are those of HookedTransformer, with values equal to float
tolerance. To learn what is computed, read TransformerLens instead. The differences:

- Keys are rotated once and stored rotated, in buffers that are written to in place.
- Grouped keys and values are never repeated.
- Attention is fused unless its scores or pattern are needed.
- Masks, positions and rotary tables are computed once per step instead of once per layer.
- Products of few rows are computed in pieces (`products`), and weights that multiply the same input at once.
- On CUDA, steps of one token run in buffers of fixed shape (`fixed`, `decoder`) and are replayed as CUDA graphs
  (`recording`).
- Hook points without hooks are not called.

TransformerLens computes calls with gradients, calls that begin or end between layers, models with hooks on modules
rather than hook points, and options that FastForward does not support. With `load_model(..., fast=False)` or the
environment variable `TLCAPTURE_FAST=0`, models are plain HookedTransformers.
"""

from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.state import FastState

__all__ = ["FastForward", "FastState"]
