"""A `past_kv_cache` of TransformerLens that stores the keys and values of the fast forward pass.

Import it only if TransformerLens has HookedTransformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.state import FastState, rows_of
from tlcapture.models.streams import upload
from tlcapture.shapes import Rows


class FastCache(TransformerLensKeyValueCache):
    """A `past_kv_cache` that FastForward updates in place and other code reads as that of TransformerLens.

    Attributes:
        state: the keys and values while only FastForward uses the cache. The first access to `entries`, for example by
            TransformerLens's blocks or `freeze`, converts them; `state` is then `None`, and the cache behaves like that
            of TransformerLens.
        computed_by: the forward pass that computed the keys and values; `None` before the first pass.
        is_converted: whether the cache was created by TransformerLens and converted by `convert`.
        decoder: the Decoder that lent the state its store, or `None`.
    """

    state: FastState | None
    decoder: Any = None

    def __init__(self, cfg: Any, device: torch.device | str | None, batch_size: int):
        self.previous_attention_mask = torch.empty(batch_size, 0, device=device, dtype=torch.int)
        self.frozen = False
        self._begin(cfg, device, batch_size)

    def _begin(self, cfg: Any, device: torch.device | str | None, batch_size: int) -> None:
        self._cfg, self._device = cfg, device
        self._entries: list[Any] | None = None
        self.state = FastState.empty(batch_size, torch.device(device or cfg.device))
        self.computed_by: FastForward | None = None  # set by the first pass, which reads the current model
        self.is_converted = False

    @classmethod
    def init_cache(cls, cfg: Any, device: torch.device | str | None, batch_size: int = 1) -> FastCache:
        """An empty cache, with the signature of TransformerLens's `init_cache`."""
        return cls(cfg, device, batch_size)

    @staticmethod
    def convert(cache: TransformerLensKeyValueCache, cfg: Any) -> None:
        """Turn an empty TransformerLens cache into a FastCache in place, for example one created by `generate`."""
        batch_size, device = len(cache.previous_attention_mask), cache.previous_attention_mask.device
        vars(cache).pop("entries")
        cache.__class__ = FastCache
        cache._begin(cfg, device, batch_size)
        cache.is_converted = True

    @property
    def entries(self) -> list[Any]:
        """Keys and values of each layer in TransformerLens's format, `[batch, pos, n_kv_heads, d_head]`."""
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
        """The number of positions in the cache."""
        return self.entries[0].past_keys.shape[1] if self.state is None else self.state.length

    def __repr__(self) -> str:
        return f"FastCache(batch {len(self.previous_attention_mask)}, {self.length} positions, frozen={self.frozen})"

    def micro_batch(self, rows: slice, state: FastState) -> FastCache:
        """An empty cache for some rows, which stores keys and values in `state`, a view of this cache's state."""
        cache = FastCache(self._cfg, self._device, rows.stop - rows.start)
        cache.state, cache.computed_by = state, self.computed_by
        return cache


def keep_rows(cache: TransformerLensKeyValueCache, rows: Rows) -> None:
    """Drop all rows from a FastCache or a TransformerLens cache except `rows`, a boolean mask `[batch]` on the CPU."""
    kept = [row for row, stays in enumerate(rows.tolist()) if stays]
    cache.previous_attention_mask = rows_of(cache.previous_attention_mask, kept)
    if isinstance(cache, FastCache) and cache.state is not None:
        return cache.state.keep(kept)
    for entry in cache.entries:
        entry.past_keys, entry.past_values = rows_of(entry.past_keys, kept), rows_of(entry.past_values, kept)


def branch_rows(cache: TransformerLensKeyValueCache, rows: Sequence[int], cfg: Any) -> TransformerLensKeyValueCache:
    """A new cache whose rows are copies of the given rows of `cache`, which is not modified."""
    mask: Tensor = cache.previous_attention_mask
    index = upload(rows, mask.device)
    if isinstance(cache, FastCache) and cache.state is not None:
        fast = FastCache.init_cache(cfg, mask.device, len(rows))
        fast.state, fast.computed_by = cache.state.branch(rows), cache.computed_by
        branched: TransformerLensKeyValueCache = fast
    else:
        branched = TransformerLensKeyValueCache.init_cache(cfg, mask.device, len(rows))
        # TransformerLens extends its cache with new tensors and never writes to existing ones.
        for entry, source in zip(branched.entries, cache.entries, strict=True):
            chosen = index.to(source.past_keys.device)
            entry.past_keys, entry.past_values = source.past_keys[chosen], source.past_values[chosen]
    branched.previous_attention_mask = mask[index]
    return branched
