"""Keys and values kept between forward passes of a batch, and data shared by all layers of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tlcapture.shapes import Mask, Rows

_MIN_GROWTH = 64  # the fewest positions by which the buffer of keys and values grows


@dataclass
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

    def keep(self, rows: Rows) -> None:
        """Drop all rows except `rows`, a boolean mask `[batch]`; they are moved within the store."""
        self.mask = self.mask[rows]
        if self.store is not None:
            kept = rows.nonzero()[:, 0].tolist()
            for new_row, row in enumerate(kept):
                if new_row != row:
                    self.store[:, :, new_row, :, : self.length] = self.store[:, :, row, :, : self.length]
            self.store = self.store[:, :, : len(kept)]

    def branch(self, rows: Sequence[int]) -> FastState:
        """A new state with copies of the given rows."""
        index = torch.tensor(rows, device=self.mask.device)
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


@dataclass
class Step:
    """Data shared by all layers of a forward pass; masks and rotary tables are computed on first use.

    Attributes:
        mask: the mask of all positions so far, `[batch, key]`.
        start: index of the first new position.
        stop: number of positions so far, including the new ones.
        groups: number of query heads per key-value head.
        dtype: dtype of the residual stream.
        window: size of the sliding window in local layers.
        padded: whether any position is masked.
        rotations: cosines and sines by kind of layer, `global` or `local`.
    """

    mask: Mask
    start: int
    stop: int
    groups: int
    dtype: torch.dtype
    window: int | None
    padded: bool
    rotations: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)
    _allowed: dict[str, Tensor | None] = field(default_factory=dict)
    _bias: dict[str, Tensor | None] = field(default_factory=dict)
    _fully_masked: dict[str, Tensor | None] = field(default_factory=dict)

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

    def fully_masked(self, kind: str) -> Tensor | None:
        """The queries without any key, which are padding, `[batch, 1, query, 1]`; `None` if there are none."""
        if kind not in self._fully_masked:
            allowed = self.allowed(kind) if self.padded and self.stop - self.start > 1 else None
            self._fully_masked[kind] = None if allowed is None else ~allowed.any(dim=-1, keepdim=True)
        return self._fully_masked[kind]

    def is_causal(self, kind: str) -> bool:
        """Whether torch's `is_causal` attention applies: whole prompts without padding or a shorter window, on a CPU.

        It needs no mask and halves the time for long prompts.
        """
        has_all_keys = kind != "local" or self.window is None or self.stop <= self.window
        return self.start == 0 and self.stop > 1 and not self.padded and has_all_keys and self.mask.device.type == "cpu"

    def bias(self, kind: str) -> Tensor | None:
        """The mask `allowed` as a bias to add to attention scores, `[batch or 1, 1, groups * query, key]`.

        Query heads that share keys are concatenated along the queries. Masked keys have half the lowest finite value
        instead of -inf, so that rows that consist only of padding stay finite. `None` if no key is masked.
        """
        if kind not in self._bias:
            allowed = self.allowed(kind)
            bias: Tensor | None = None
            if allowed is not None:
                batch, _, n_queries, n_keys = allowed.shape
                bias = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
                bias.masked_fill_(~allowed, torch.finfo(self.dtype).min / 2)
                if n_queries > 1:
                    bias = bias[:, :, None].expand(-1, -1, self.groups, -1, -1)
                    bias = bias.reshape(batch, 1, self.groups * n_queries, n_keys)
            self._bias[kind] = bias
        return self._bias[kind]
