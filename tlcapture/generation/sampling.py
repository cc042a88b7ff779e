"""Choosing the next token: greedily or by sampling, with one random generator per prompt, and when to stop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlcapture.errors import InputError
from tlcapture.generation.processors import NO_RULES, LogitRules
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import LastLogits

STOP_TOKEN = "stop_token"
MAX_NEW_TOKENS = "max_new_tokens"


PLAIN, CHECKPOINT = "plain", "checkpoint"
SAMPLINGS = (PLAIN, CHECKPOINT)
DEFAULT_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Sampling:
    """How next tokens are chosen. Temperature 0 is greedy; the seed is combined with each prompt's set and id.

    `rules` change the logits first; `source` says whether they are those of the checkpoint.

    Raises `InputError` for a temperature that is negative, NaN or infinite.
    """

    temperature: float = DEFAULT_TEMPERATURE
    seed: int = 0
    rules: LogitRules = NO_RULES
    source: str = PLAIN

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature}: expected a number of at least 0; 0 is greedy")

    def record(self) -> dict[str, Any]:
        """The sampling as metadata; without `sampling` where only temperature and seed matter."""
        rules = self.rules.active(greedy=self.temperature == 0)
        more = {"sampling": {"source": self.source, **rules}} if rules or self.source != PLAIN else {}
        return {"temperature": self.temperature, "seed": self.seed, **more}


GREEDY = Sampling(temperature=0)


def stop_reason(response: Sequence[int], stops: frozenset[int], max_new_tokens: int) -> str | None:
    """Why a response ends after its last token, `STOP_TOKEN` or `MAX_NEW_TOKENS`; `None` if it goes on."""
    if response and response[-1] in stops:
        return STOP_TOKEN
    return MAX_NEW_TOKENS if len(response) >= max_new_tokens else None


def prompt_generator(seed: int, prompt: TokenizedPrompt) -> torch.Generator:
    """A prompt's own random generator, seeded by the seed, the prompt set and the prompt's id."""
    name = f"{seed}\0{prompt.prompt_set}\0{prompt.id}".encode()
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(number)


def choose_tokens(logits: LastLogits, temperature: float, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row: the likeliest, or a draw by inverting the distribution function at a random number.

    Each token takes one number from its prompt's own generator, and the sum is in float64, so that the other rows of
    the batch change neither.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    device = logits.device if logits.is_cuda else torch.device("cpu")  # not all accelerators have float64
    heights = logits.to(device, torch.float64)
    # With 0 as the largest, no temperature overflows.
    heights = heights - heights.amax(dim=-1, keepdim=True)
    heights = (heights / temperature).softmax(dim=-1).cumsum(dim=-1)
    draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]).to(
        device
    )
    tokens = torch.searchsorted(heights, draws * heights[:, -1:], right=True)
    return tokens[:, 0].clamp(max=logits.shape[-1] - 1).tolist()
