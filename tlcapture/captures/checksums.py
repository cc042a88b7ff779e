"""Checksums of stored activations, one per row of a buffer, so that only the rows that are read have to be checked.

A row's checksum is the sum of its bytes as little-endian words of 64 bits, modulo 2**64, which takes less than half the
time of CRC32. Any change of a single byte changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlcapture.errors import StorageError

_WORD = 8  # bytes


def row_sums(tensor: Tensor) -> list[int]:
    """The checksum of each row of a tensor `[n_rows, ...]`."""
    n_rows = tensor.shape[0]
    if not tensor.numel():
        return [0] * n_rows
    rows = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(n_rows, -1)
    if rows.shape[1] % _WORD:
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % _WORD)))
    return [int(found) for found in rows.view("<u8").sum(axis=1, dtype=np.uint64)]


@dataclass
class WrittenSums:
    """The checksums stored in a file for the rows of its buffers, by the name of the buffer.

    `path` and `part` (`prompt` or `response`) are used in messages.
    """

    path: Path
    part: str
    stated: Mapping[str, Sequence[int]]
    _read: dict[str, set[int]] = field(default_factory=dict)  # which rows have been checked

    def __call__(self, name: str, buffer: Tensor, rows: Iterable[int]) -> None:
        """Raise `StorageError` if any of these rows is not what was written; each is checked once."""
        known, stated = self._read.setdefault(name, set()), self.stated.get(name)
        unread = [] if stated is None else [row for row in rows if row not in known]
        found = row_sums(buffer if len(unread) == len(buffer) else buffer[unread])
        if stated is not None and found != [stated[row] for row in unread]:
            raise StorageError(
                f"{self.path}: damaged: activations of the {self.part} do not match their checksum: restore the file, "
                "or capture the prompt again"
            )
        known.update(unread)
