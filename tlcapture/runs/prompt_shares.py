"""A share of the prompts of a set (`--shard`), for one of several runs that capture the set together.

    PromptShare.parse("2/3").of(["1", "2", "3", "4", "5"])      # ["2", "5"]

The shares 1/n to n/n are a partition of the prompts. Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from tlcapture.errors import InputError

T = TypeVar("T")
_FORM = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)


@dataclass(frozen=True)
class PromptShare:
    """Share `number` of `count`, counted from 1: every `count`-th prompt, in the order of the set."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> PromptShare:
        """Read `i/n`; raises `InputError` unless 1 <= i <= n."""
        match = _FORM.fullmatch(text.strip())
        share = cls(int(match[1]), int(match[2])) if match else None
        if share is None or not 1 <= share.number <= share.count:
            raise InputError(f"{text!r} is not a shard: expected i/n with i from 1 to n, for example 1/8")
        return share

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """The items that belong to this share."""
        return items[self.number - 1 :: self.count]
