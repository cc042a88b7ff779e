"""HookedTransformer with a forward pass that does less work between its matrix products.

    hooked = FastHookedTransformer(cfg)                                # what `load_model` makes of a checkpoint
    logits, cache = hooked.run_with_cache(tokens)                      # TransformerLens's own, over `forward`
    cache = FastCache.init_cache(hooked.cfg, hooked.cfg.device, 1)
    logits = hooked(tokens, past_kv_cache=cache)                       # and so on, token by token

`transformer.FastHookedTransformer` is the model, a subclass whose `forward` computes by `forward.FastForward` what
that supports and hands all else to TransformerLens; `cache.FastCache` is its `past_kv_cache`. Both exist where
TransformerLens has HookedTransformer, and are imported from their modules when they are needed.

The same parameters, the same hook points with the same tensors, the same values to float tolerance; a
reader who wants to know what is computed can skip this module and read TransformerLens. What differs:
keys are rotated once and kept rotated, in buffers that are written to in place; grouped keys and values
are never repeated; attention is fused unless somebody watches its scores or pattern; masks, positions
and rotary tables are made once a step, not once a layer; products of few rows take another way (`products`);
and a hook point that nobody hooked is not called. Left to TransformerLens are calls with gradients, those that begin
or end between layers, hooks of modules themselves, and options that FastForward does not know. With
`load_model(..., fast=False)` or the environment variable `TLCAPTURE_FAST=0` models are HookedTransformer itself.
"""

from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.state import FastState

__all__ = ["FastForward", "FastState"]
