"""Token sequences of different lengths as one batch: token ids and a mask that is 0 at padding.

    tokens, mask = left_pad([[5, 6, 7], [8]])      # tokens [[5, 6, 7], [0, 0, 8]], mask [[1, 1, 1], [0, 0, 1]]

Prompts are padded on the left, so that all rows continue at the same position. Sequences that follow tokens which are
in a state already are padded on the right: padding in between would enlarge the distances that sliding windows see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tlcapture.shapes import Mask, Tokens


def left_pad(sequences: Sequence[Sequence[int]]) -> tuple[Tokens, Mask]:
    """Token ids and mask `[batch, pos]` of sequences that end at the last position."""
    tokens, mask = _empty(sequences)
    width = tokens.shape[1]
    for row, ids in enumerate(sequences):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens, mask


def right_pad(sequences: Sequence[Sequence[int]]) -> tuple[Tokens, Mask]:
    """Token ids and mask `[batch, pos]` of sequences that begin at the first position."""
    tokens, mask = _empty(sequences)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return tokens, mask


def _empty(sequences: Sequence[Sequence[int]]) -> tuple[Tokens, Mask]:
    shape = (len(sequences), max(map(len, sequences)))
    return torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
