"""TransformerLens hooks that a recorded decode step may hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any


class RecordableHooks(list[tuple[str, Callable[..., Any]]]):
    """TransformerLens's `fwd_hooks`: names of hook points and functions, called after those of others.

    Hooks of the same `key` do the same with the same tensors at every step, wait for nothing, and may see rows
    of a batch that have ended and future keys. So a step that was recorded with them can be replayed.
    """

    def __init__(self, hooks: Iterable[tuple[str, Callable[..., Any]]], key: tuple[Hashable, ...]):
        super().__init__(hooks)
        self.key = key
