"""A cache of transformers whose keys and values grow in place, without a copy of the earlier ones in each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_STEP = 64  # positions for which there is room at least


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, `[batch, heads, pos, d_head]`: views of buffers with room for further positions.

    Whatever replaces `keys` or `values`, such as a choice of rows, gets buffers of its own in the next update.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new positions; returns all keys and all values."""
        if not self.get_seq_length() or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, earlier: Tensor, new: Tensor) -> Tensor:
        n_earlier, n_all = earlier.shape[-2], earlier.shape[-2] + new.shape[-2]
        views: dict[str, Tensor] = self.__dict__.setdefault("_views", {})
        buffers: dict[str, Tensor] = self.__dict__.setdefault("_buffers", {})
        buffer = buffers.get(name) if views.get(name) is earlier else None
        if buffer is None or n_all > buffer.shape[-2]:
            room = max(_STEP, n_all // 4)
            dtype = torch.promote_types(earlier.dtype, new.dtype)
            buffer = earlier.new_empty((*earlier.shape[:-2], n_all + room, earlier.shape[-1]), dtype=dtype)
            buffer[..., :n_earlier, :] = earlier
            buffers[name] = buffer
        buffer[..., n_earlier:n_all, :] = new
        views[name] = buffer[..., :n_all, :]
        return views[name]


def grow_in_place(cache: Any) -> None:
    """Let those layers of a `DynamicCache` grow in place that keep all positions; others stay as they are.

    Args:
        cache: what a model returned as its cache.
    """
    if type(cache) is DynamicCache:
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = GrowingLayer
