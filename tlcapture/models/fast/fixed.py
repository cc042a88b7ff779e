"""Steps of one new token per row in tensors whose shape and place stay the same, as a recorded step needs them.

No Python number changes from step to step: positions of writes, masks and rotations
come from tensors on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tlcapture.models.fast.cache import FastCache
from tlcapture.models.fast.state import FastState, Step
from tlcapture.shapes import Mask, MaskSoFar, Tokens


@dataclass(eq=False)
class FixedState(FastState):
    """Keys and values of a batch that has room for the next token.

    Attributes:
        mask: 0 where positions are padded or still to come, else 1, `[batch, key]`.
        store: `[layer, 2, batch, n_kv_heads, capacity, d_head]`; the first `key` positions are read.
        position: the index of the next token, `[1]`.
        n_filled: the number of positions so far.
    """

    position: Tensor | None = None
    n_filled: int = 0

    @property
    def length(self) -> int:
        """The number of positions so far."""
        return self.n_filled

    def begin(self, mask: Mask, groups: int, window: int | None) -> Step:
        """The step of the next token of each row."""
        n_keys = mask.shape[1]
        return FixedStep(mask, n_keys - 1, n_keys, groups, window, padded=True, position=self.position)

    def reserve(self, length: int, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """The store, which has room for all positions already."""
        assert self.store is not None
        return self.store


@dataclass(eq=False)
class FixedStep(Step):
    """The step of one token per row; `stop` is the number of keys that are read, including keys still to come.

    Attributes:
        position: the index of the new token, `[1]`.
    """

    position: Tensor | None = None

    @cached_property
    def positions(self) -> Tensor:
        """The position of each new token in its row, without padding, `[batch, 1]`."""
        return self.mask.sum(dim=1, keepdim=True) - 1

    def embed_positions(self, pos_embed: Any, tokens: Tokens) -> Tensor:
        """Rows of the position embedding, `[batch, 1, d_model]`; new tokens are never padding."""
        return pos_embed.W_pos[self.positions]

    def append(self, store: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer that are read, with those of the new token."""
        assert self.position is not None
        all_keys, all_values = store[..., : self.stop, :].unbind()
        all_keys.index_copy_(2, self.position, keys.transpose(1, 2).to(store.dtype))
        all_values.index_copy_(2, self.position, values.transpose(1, 2).to(store.dtype))
        return all_keys, all_values

    def allowed(self, kind: str) -> Tensor:
        """The keys that each new token may attend to, `[batch, 1, 1, key]`."""
        assert self.position is not None
        found = self._allowed.get(kind)
        if found is None:
            found = self.mask.bool()[:, None, None]
            if kind == "local" and self.window is not None and self.window < self.stop:
                found = found & (torch.arange(self.stop, device=self.mask.device) > self.position - self.window)
            self._allowed[kind] = found
        return found

    def fully_masked(self, kind: str) -> Tensor | None:
        """`None`: each new token attends to itself."""
        return None

    def is_causal(self, kind: str) -> bool:
        """False: keys still to come are masked."""
        return False


class FixedCache(FastCache):
    """A `past_kv_cache` for one step of one token per row of a FixedState."""

    @classmethod
    def over(cls, state: FixedState, cache: FastCache) -> FixedCache:
        """The cache of a state that has keys and values of `cache`."""
        fixed = cls(cache._cfg, cache._device, len(state.mask))
        fixed.state, fixed.computed_by = state, cache.computed_by
        return fixed

    def append_attention_mask(self, attention_mask: Mask) -> MaskSoFar:
        """The mask of all keys, in which the positions of the new tokens are now 1."""
        assert isinstance(self.state, FixedState) and self.state.position is not None
        return self.state.mask.index_fill_(1, self.state.position, 1)
