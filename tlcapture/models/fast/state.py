"""What a batch leaves for its next pass, and what all layers of a pass share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tlcapture.shapes import Mask, Rows

_ROOM = 64  # positions by which the buffer of keys and values grows at least


@dataclass
class FastState:
    """Keys and values of a batch so far, `[layer, 2, batch, n_kv_heads, capacity, d_head]`, and its mask."""

    mask: Mask
    store: Tensor | None = None

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> FastState:
        return cls(torch.zeros(batch_size, 0, dtype=torch.long, device=device))

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def keep(self, rows: Rows) -> None:
        """Drop all but `rows`, which move up within the store."""
        self.mask = self.mask[rows]
        if self.store is not None:
            kept = rows.nonzero()[:, 0].tolist()
            for place, row in enumerate(kept):
                if place != row:
                    self.store[:, :, place, :, : self.length] = self.store[:, :, row, :, : self.length]
            self.store = self.store[:, :, : len(kept)]

    def branch(self, rows: Sequence[int]) -> FastState:
        """A new state of copies of the given rows."""
        index = torch.tensor(rows, device=self.mask.device)
        return FastState(self.mask[index], None if self.store is None else self.store[:, :, index])

    def reserve(self, length: int, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """The store, with room for `length` positions; `shape` is `(n_layers, n_kv_heads, d_head)`."""
        n_layers, n_heads, d_head = shape
        if self.store is None or self.store.shape[-2] < length:
            old = 0 if self.store is None else self.store.shape[-2]
            capacity = length + max(_ROOM, old // 2)
            grown = like.new_empty(n_layers, 2, self.mask.shape[0], n_heads, capacity, d_head)
            if self.store is not None:
                grown[..., :old, :] = self.store
            self.store = grown
        elif self.store.is_inference() and not torch.is_inference_mode_enabled():
            self.store = self.store.clone()  # it could not be written to
        return self.store


@dataclass
class Step:
    """What all layers of one forward pass share. `allowed` and `bias` are made when first asked for."""

    mask: Mask  # of all positions so far
    start: int
    stop: int
    groups: int
    dtype: torch.dtype
    window: int | None
    padded: bool
    rotations: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)
    _allowed: dict[str, Tensor | None] = field(default_factory=dict)
    _bias: dict[str, Tensor | None] = field(default_factory=dict)
    _blind: dict[str, Tensor | None] = field(default_factory=dict)

    def allowed(self, kind: str) -> Tensor | None:
        """Which keys each query may see, `[batch or 1, 1, query, key]`; `None` where it is all of them."""
        if kind not in self._allowed:
            device = self.mask.device
            queries = torch.arange(self.start, self.stop, device=device)[:, None]
            keys = torch.arange(self.stop, device=device)
            window = self.window if kind == "local" else None
            if self.stop - self.start == 1 and not self.padded and (window is None or self.stop <= window):
                self._allowed[kind] = None
            else:
                seen = keys <= queries
                if window is not None:
                    seen &= keys > queries - window
                seen = seen[None, None]
                self._allowed[kind] = seen & self.mask[:, None, None].bool() if self.padded else seen
        return self._allowed[kind]

    def blind(self, kind: str) -> Tensor | None:
        """Queries that may see no key, padding that is, `[batch, 1, query, 1]`; `None` where there are none."""
        if kind not in self._blind:
            seen = self.allowed(kind) if self.padded and self.stop - self.start > 1 else None
            self._blind[kind] = None if seen is None else ~seen.any(dim=-1, keepdim=True)
        return self._blind[kind]

    def is_causal(self, kind: str) -> bool:
        """Whether a whole prompt without padding sees all that came before: then torch needs no mask, and a CPU
        takes half the time for a long one."""
        sees_all = kind != "local" or self.window is None or self.stop <= self.window
        return self.start == 0 and self.stop > 1 and not self.padded and sees_all and self.mask.device.type == "cpu"

    def bias(self, kind: str) -> Tensor | None:
        """The same as numbers to add to scores, for queries grouped by the heads that share keys.

        Half of the lowest number rather than -inf, so that a row of padding alone stays finite.
        """
        if kind not in self._bias:
            seen = self.allowed(kind)
            if seen is not None:
                batch, _, n_queries, n_keys = seen.shape
                bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
                seen = bias.masked_fill_(~seen, torch.finfo(self.dtype).min / 2)
                if n_queries > 1:
                    seen = seen[:, :, None].expand(-1, -1, self.groups, -1, -1)
                    seen = seen.reshape(batch, 1, self.groups * n_queries, n_keys)
            self._bias[kind] = seen
        return self._bias[kind]
