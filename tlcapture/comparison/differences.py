"""The differences between two captures, token by token: pure functions on activations and logits.

All are of `b` against `a`: projections of `b` less those of `a`, the norm of `b` over that of `a`, and the divergence
`D(a || b)` of the next-token distributions in nats, the expectation under `a` of `log p_a - log p_b`. They are computed
in float64, so that equal activations give exactly 0, or a cosine and a ratio of exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from tlcapture.errors import NumericalError
from tlcapture.shapes import Logits, Residual, Trajectory, Vector

_AT_ONCE = 2**24  # logits in float64 that are in memory at once, 128 MiB

Unembed = Callable[[Residual], Logits]


def cosine(a: Residual, b: Residual) -> Tensor:
    """The cosine of the angle between activations `[n_tokens, d_model]`; NaN where one is zero."""
    one, other = a.double(), b.double()
    squares = one.square().sum(-1) * other.square().sum(-1)
    lengths = torch.from_numpy(np.sqrt(squares.numpy()))  # torch's root of a square may differ by its last bit
    return (one * other).sum(-1) / torch.where(lengths > 0, lengths, torch.nan)


def norm_ratio(a: Residual, b: Residual) -> Tensor:
    """The length of `b` over that of `a`, by token; NaN where `a` is zero."""
    one, other = (each.double().square().sum(-1).sqrt() for each in (a, b))
    return other / torch.where(one > 0, one, torch.nan)


def projected(activations: Residual, vector: Vector) -> Trajectory:
    """The projections `h . v / ||v||` of activations `[n_tokens, d_model]`, in float64."""
    unit = vector.double() / vector.double().norm()
    return (activations.double() * unit).sum(-1)


def divergence(a: Residual, b: Residual, unembed_a: Unembed, unembed_b: Unembed, d_vocab: int) -> Trajectory:
    """`D(a || b)` by token, in nats, of the next-token distributions after residuals `[n_tokens, d_model]`.

    Raises `NumericalError` where it is not finite.
    """
    n_rows = max(1, _AT_ONCE // d_vocab)
    pieces = []
    for start in range(0, len(a), n_rows):
        rows = slice(start, start + n_rows)
        pieces.append(_on_device(unembed_a(a[rows]).detach(), unembed_b(b[rows]).detach()))
    found = torch.cat(pieces)
    if not found.isfinite().all():
        raise NumericalError("the divergence of the next-token distributions is not finite: leave it out with --no-kl")
    return found


def _on_device(a: Logits, b: Logits) -> Tensor:
    """The divergence in main memory, computed where the logits are if float64 is known there and fits in memory."""
    if a.is_cuda and a.device == b.device:
        with suppress(torch.OutOfMemoryError):
            return _divergence(a, b).cpu()
    return _divergence(a.cpu(), b.cpu())


def _divergence(a: Logits, b: Logits) -> Tensor:
    log_a, log_b = (each.double().log_softmax(-1) for each in (a, b))
    surprise = torch.where(log_a == -torch.inf, 0.0, log_a - log_b)
    return (log_a.exp() * surprise).sum(-1).clamp(min=0)
