"""TransformerLens's cache of keys and values, with those of the fast forward pass in it.

Only imported where TransformerLens has HookedTransformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.state import FastState
from tlcapture.shapes import Rows


class FastCache(TransformerLensKeyValueCache):
    """A `past_kv_cache` that FastForward writes to in place, and all else reads as TransformerLens's own.

    `state` holds the keys and values while FastForward alone deals with them. Whoever asks for `entries` (as
    TransformerLens's blocks do, and `freeze`) gets them in TransformerLens's form; from then on `state` is `None`
    and the cache is one like any other of TransformerLens's.
    """

    state: FastState | None

    def __init__(self, cfg: Any, device: torch.device | str | None, batch_size: int):
        self.previous_attention_mask = torch.empty(batch_size, 0, device=device, dtype=torch.int)
        self.frozen = False
        self._begin(cfg, device, batch_size)

    def _begin(self, cfg: Any, device: torch.device | str | None, batch_size: int) -> None:
        self._cfg, self._device = cfg, device
        self._entries: list[Any] | None = None
        self.state = FastState.empty(batch_size, torch.device(device or cfg.device))
        self.computed_by: FastForward | None = None  # set by the first pass, which looks at the model anew
        self.is_adopted = False

    @classmethod
    def init_cache(cls, cfg: Any, device: torch.device | str | None, batch_size: int = 1) -> FastCache:
        """An empty cache, with the arguments of TransformerLens's own `init_cache`."""
        return cls(cfg, device, batch_size)

    @staticmethod
    def adopt(cache: TransformerLensKeyValueCache, cfg: Any) -> None:
        """Make a FastCache of an empty cache of TransformerLens's, in place: one that `generate` made for itself."""
        batch_size, device = len(cache.previous_attention_mask), cache.previous_attention_mask.device
        vars(cache).pop("entries")
        cache.__class__ = FastCache
        cache._begin(cfg, device, batch_size)
        cache.is_adopted = True

    @property
    def entries(self) -> list[Any]:
        """Keys and values by layer, `[batch, pos, n_kv_heads, d_head]`, as TransformerLens keeps them."""
        if self._entries is None:
            assert self.state is not None
            batch_size = len(self.state.mask)
            fresh = TransformerLensKeyValueCache.init_cache(self._cfg, self._device, batch_size).entries
            if self.state.store is not None:
                assert self.computed_by is not None
                for entry, (keys, values) in zip(fresh, self.computed_by.keys_and_values(self.state), strict=True):
                    entry.past_keys, entry.past_values = keys, values
            self._entries, self.state = fresh, None
        return self._entries

    @property
    def length(self) -> int:
        """How many positions there are keys and values of."""
        return self.entries[0].past_keys.shape[1] if self.state is None else self.state.length

    def __repr__(self) -> str:
        return f"FastCache(batch {len(self.previous_attention_mask)}, {self.length} positions, frozen={self.frozen})"

    def part(self, rows: slice, state: FastState) -> FastCache:
        """A cache without any position for some rows, whose keys and values go to `state`, a piece of this one's."""
        part = FastCache(self._cfg, self._device, rows.stop - rows.start)
        part.state, part.computed_by = state, self.computed_by
        return part


def keep_rows(cache: TransformerLensKeyValueCache, rows: Rows) -> None:
    """Drop all but `rows`, a mask `[batch]`, from a cache of either kind."""
    cache.previous_attention_mask = cache.previous_attention_mask[rows]
    if isinstance(cache, FastCache) and cache.state is not None:
        return cache.state.keep(rows)
    for entry in cache.entries:
        kept = rows.to(entry.past_keys.device)
        entry.past_keys, entry.past_values = entry.past_keys[kept], entry.past_values[kept]


def branch_rows(cache: TransformerLensKeyValueCache, rows: Sequence[int], cfg: Any) -> TransformerLensKeyValueCache:
    """A new cache whose rows are copies of the given rows of another, which stays as it is."""
    mask: Tensor = cache.previous_attention_mask
    index = torch.tensor(rows, device=mask.device)
    if isinstance(cache, FastCache) and cache.state is not None:
        fast = FastCache.init_cache(cfg, mask.device, len(rows))
        fast.state, fast.computed_by = cache.state.branch(rows), cache.computed_by
        branched: TransformerLensKeyValueCache = fast
    else:
        branched = TransformerLensKeyValueCache.init_cache(cfg, mask.device, len(rows))
        # TransformerLens extends its cache by making new tensors: nothing of the old one is written to.
        for entry, origin in zip(branched.entries, cache.entries, strict=True):
            chosen = index.to(origin.past_keys.device)
            entry.past_keys, entry.past_values = origin.past_keys[chosen], origin.past_values[chosen]
    branched.previous_attention_mask = mask[index]
    return branched
