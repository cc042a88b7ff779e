"""Views: pure functions from the cache of one prompt's run to one kind of output each.

A cache maps TransformerLens's names to activations over prompt and response in one line, without a
batch axis: `[n_tokens, ...]`, patterns `[n_heads, n_tokens, n_tokens]`. Each view says by `..._hooks`
which activations it reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Cache = Mapping[str, Tensor]
