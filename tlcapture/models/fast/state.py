"""Keys and values kept between forward passes of a batch, and data shared by all layers of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tlcapture.models.streams import upload
from tlcapture.shapes import Mask, Tokens

_MIN_GROWTH = 64  # the fewest positions by which the buffer of keys and values grows


@dataclass(eq=False)
class FastState:
    """The keys, values and mask of a batch.

    Attributes:
        mask: 0 where positions are padded, else 1, `[batch, pos]`.
        store: rotated keys and values, `[layer, 2, batch, n_kv_heads, capacity, d_head]`, of which the first `length`
            positions are valid; `None` before the first pass.
    """

    mask: Mask
    store: Tensor | None = None

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> FastState:
        """A state without positions."""
        return cls(torch.zeros(batch_size, 0, dtype=torch.long, device=device))

    @property
    def length(self) -> int:
        """The number of positions so far."""
        return self.mask.shape[1]

    def begin(self, mask: Mask, groups: int, window: int | None) -> Step:
        """The step from the positions so far to all positions of `mask`, which becomes the state's mask."""
        start, self.mask = self.length, mask
        # On a GPU, a mask of ones is cheaper than the synchronization needed to find that there is no padding.
        padded = mask.device.type != "cpu" or not bool(mask.all())
        return Step(mask, start, self.length, groups, window, padded)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows except these, in ascending order; they are moved within the store."""
        self.mask = rows_of(self.mask, rows)
        if self.store is not None:
            for new_row, row in enumerate(rows):
                if new_row != row:
                    self.store[:, :, new_row, :, : self.length] = self.store[:, :, row, :, : self.length]
            self.store = self.store[:, :, : len(rows)]

    def branch(self, rows: Sequence[int]) -> FastState:
        """A new state with copies of the given rows."""
        index = upload(rows, self.mask.device)
        return FastState(self.mask[index], None if self.store is None else self.store[:, :, index])

    def reserve(self, length: int, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """The store, grown if necessary to a capacity of `length` positions.

        Args:
            shape: `(n_layers, n_kv_heads, d_head)`.
            like: a tensor with the dtype and device of the store.
        """
        n_layers, n_heads, d_head = shape
        if self.store is None or self.store.shape[-2] < length:
            old = 0 if self.store is None else self.store.shape[-2]
            capacity = length + max(_MIN_GROWTH, old // 2)
            grown = like.new_empty(n_layers, 2, self.mask.shape[0], n_heads, capacity, d_head)
            if self.store is not None:
                grown[..., :old, :] = self.store
            self.store = grown
        elif self.store.is_inference() and not torch.is_inference_mode_enabled():
            self.store = self.store.clone()  # inference tensors cannot be modified outside inference mode
        return self.store


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows; unlike with an index, nothing has to reach the device for it."""
    return torch.stack([tensor[row] for row in rows]) if rows else tensor[:0]


@dataclass(eq=False)
class Step:
    """Data shared by all layers of a forward pass; masks and rotary tables are computed on first use.

    Attributes:
        mask: the mask of all positions so far, `[batch, key]`.
        start: index of the first new position.
        stop: number of positions so far, including the new ones.
        groups: number of query heads per key-value head.
        window: size of the sliding window in local layers.
        padded: whether any position is masked.
        rotations: cosines and sines by kind of layer, `global` or `local`.
    """

    mask: Mask
    start: int
    stop: int
    groups: int
    window: int | None
    padded: bool
    rotations: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)
    _allowed: dict[str, Tensor | None] = field(default_factory=dict)
    _masked: dict[str, Tensor | None] = field(default_factory=dict)
    _penalty: dict[tuple[str, torch.dtype], Tensor | None] = field(default_factory=dict)
    _bias: dict[tuple[str, torch.dtype], Tensor | None] = field(default_factory=dict)
    _fully_masked: dict[str, Tensor | None] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Tensor:
        """The position of each new token in its row, without padding, `[batch, query]`."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, self.start :]

    def embed_positions(self, pos_embed: Any, tokens: Tokens) -> Tensor:
        """The output of TransformerLens's `PosEmbed` for new tokens, `[batch, query, d_model]`."""
        return pos_embed(tokens, self.start, self.mask)

    def append(self, store: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, `[batch, n_kv_heads, key, d_head]`, with new ones appended to its store.

        Args:
            store: the layer's keys and values, `[2, batch, n_kv_heads, capacity, d_head]`.
            keys, values: those of the new positions, `[batch, query, n_kv_heads, d_head]`.
        """
        all_keys, all_values = store[..., : self.stop, :].unbind()
        all_keys[:, :, self.start :] = keys.transpose(1, 2)
        all_values[:, :, self.start :] = values.transpose(1, 2)
        return all_keys, all_values

    def allowed(self, kind: str) -> Tensor | None:
        """The keys that each query may attend to, `[batch or 1, 1, query, key]`; `None` if they are all keys."""
        if kind not in self._allowed:
            device = self.mask.device
            queries = torch.arange(self.start, self.stop, device=device)[:, None]
            keys = torch.arange(self.stop, device=device)
            window = self.window if kind == "local" else None
            if self.stop - self.start == 1 and not self.padded and (window is None or self.stop <= window):
                self._allowed[kind] = None
            else:
                allowed = keys <= queries
                if window is not None:
                    allowed &= keys > queries - window
                allowed = allowed[None, None]
                self._allowed[kind] = allowed & self.mask[:, None, None].bool() if self.padded else allowed
        return self._allowed[kind]

    def masked(self, kind: str) -> Tensor | None:
        """The opposite of `allowed`; `None` if no key is masked."""
        if kind not in self._masked:
            allowed = self.allowed(kind)
            self._masked[kind] = None if allowed is None else ~allowed
        return self._masked[kind]

    def penalty(self, kind: str, dtype: torch.dtype) -> Tensor | None:
        """-inf where `masked`, else 0, in a dtype, `[batch or 1, 1, query, key]`; `None` if no key is masked."""
        if (kind, dtype) not in self._penalty:
            masked = self.masked(kind)
            zeros = None if masked is None else torch.zeros(masked.shape, dtype=dtype, device=masked.device)
            self._penalty[kind, dtype] = None if zeros is None else zeros.masked_fill_(masked, -torch.inf)
        return self._penalty[kind, dtype]

    def fully_masked(self, kind: str) -> Tensor | None:
        """The queries without any key, which are padding, `[batch, 1, query, 1]`; `None` if there is no padding."""
        if kind not in self._fully_masked:
            allowed = self.allowed(kind) if self.padded else None
            self._fully_masked[kind] = None if allowed is None else ~allowed.any(dim=-1, keepdim=True)
        return self._fully_masked[kind]

    def is_causal(self, kind: str) -> bool:
        """Whether torch's `is_causal` attention applies: whole prompts without padding or a shorter window, on a CPU.

        It needs no mask and halves the time for long prompts.
        """
        has_all_keys = kind != "local" or self.window is None or self.stop <= self.window
        return self.start == 0 and self.stop > 1 and not self.padded and has_all_keys and self.mask.device.type == "cpu"

    def bias(self, kind: str, dtype: torch.dtype) -> Tensor | None:
        """The mask `allowed` as a bias to add to attention scores of a dtype, `[batch or 1, 1, groups * query, key]`.

        Query heads that share keys are concatenated along the queries. Masked keys have half the lowest finite value
        instead of -inf, so that rows that consist only of padding stay finite. `None` if no key is masked.
        """
        if (kind, dtype) not in self._bias:
            masked = self.masked(kind)
            bias: Tensor | None = None
            if masked is not None:
                batch, _, n_queries, n_keys = masked.shape
                bias = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
                bias.masked_fill_(masked, torch.finfo(dtype).min / 2)
                if n_queries > 1:
                    bias = bias[:, :, None].expand(-1, -1, self.groups, -1, -1)
                    bias = bias.reshape(batch, 1, self.groups * n_queries, n_keys)
            self._bias[kind, dtype] = bias
        return self._bias[kind, dtype]
