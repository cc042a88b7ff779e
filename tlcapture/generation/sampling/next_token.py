"""Choosing the next token: greedily or by sampling, with one stream of random numbers per prompt, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.generation.sampling.processors import NO_RULES, LogitRules, is_number, plain
from tlcapture.shapes import LastLogits, NextTokens, Noise, Rows
from tlcapture.text import is_unicode

STOP_TOKEN = "stop_token"
STOP_TEXT = "stop_text"
MAX_NEW_TOKENS = "max_new_tokens"
GIVEN = "given"  # a response that was read, not generated


PLAIN, CHECKPOINT = "plain", "checkpoint"
SAMPLINGS = (PLAIN, CHECKPOINT)
DEFAULT_TEMPERATURE = 0.7
# Numbers of float32: lower ones choose the likeliest token too, and higher ones any with the same probability.
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 1e-30, 1e30
_CPU_PIECE = 2**22  # logits, 16 MiB in float32: to allocate memory each time costs more than the work


_NEUTRAL = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}  # values that change nothing


@dataclass(frozen=True, repr=False)
class Sampling:
    """How next tokens are chosen, and texts that end a response.

        sampling = Sampling(temperature=0.7, top_p=0.9, stop=["\\n\\n"])
        sampling.record(), sampling.without_effect

    Attributes:
        temperature: 0 is greedy.
        seed: combined with each prompt's set and id.
        rules: the rules that change the logits first, including those that are named below.
        source: whether the rules are those of the `checkpoint`, or `plain`.
        top_p: sample from the smallest set of most likely tokens whose probabilities add up to this share.
        top_k: sample from this many of the most likely tokens.
        min_p: sample from tokens with at least this share of the probability of the most likely one.
        repetition_penalty: positive logits of tokens that prompt and response have are divided by it, negative ones
            multiplied.
        stop: a response ends with the token that completes one of these texts.

    Raises `InputError` for a value that is not valid.
    """

    temperature: float = DEFAULT_TEMPERATURE
    seed: int = 0
    rules: LogitRules = NO_RULES
    source: str = PLAIN
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed {self.seed!r}: expected a whole number of at most 64 bits")
        if not is_number(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature {self.temperature!r}: expected a number of at least 0; 0 is greedy")
        named = {name: value for name in _NEUTRAL if (value := getattr(self, name)) is not None}
        try:
            rules = replace(self.rules, **named)
        except ValueError as error:
            raise InputError(str(error)) from None
        changing = {name: None if (value := getattr(rules, name)) == none else value for name, none in _NEUTRAL.items()}
        object.__setattr__(self, "rules", replace(rules, **changing))
        for name, value in changing.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "stop", checked_stop(self.stop))

    def __repr__(self) -> str:
        shown = {"temperature": self.temperature, "seed": self.seed, **self.rules.active(greedy=False)}
        shown |= {"stop": list(self.stop)} if self.stop else {}
        shown |= {"source": self.source} if self.source != PLAIN else {}
        return f"Sampling({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def record(self) -> dict[str, Any]:
        """The sampling as metadata; without `sampling` if only temperature and seed matter."""
        rules = self.rules.active(greedy=self.temperature == 0)
        stop = {"stop": list(self.stop)} if self.stop else {}
        more = {"sampling": {"source": self.source, **rules, **stop}} if rules or stop or self.source != PLAIN else {}
        return {"temperature": self.temperature, "seed": self.seed, **more}

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Names of rules that only limit sampling, if nothing is sampled."""
        ignored = self.rules.active(greedy=False).keys() - self.rules.active(greedy=True).keys()
        return tuple(sorted(ignored)) if self.temperature == 0 else ()


def checked_stop(texts: Any) -> tuple[str, ...]:
    """Texts that end a response; raises `InputError` for anything but texts, and for an empty one."""
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"stop {texts!r}: expected a text or several")
    if not all(texts):
        raise InputError("stop '': expected a text that is not empty")
    for text in texts:
        if not is_unicode(text):
            raise InputError(f"stop {text!r}: expected valid Unicode")
    return tuple(dict.fromkeys(map(str, texts)))


GREEDY = Sampling(temperature=0)


def stop_reason(response: Sequence[int], stops: frozenset[int], max_new_tokens: int) -> str | None:
    """Why a response ends after its last token, `STOP_TOKEN` or `MAX_NEW_TOKENS`; `None` if it goes on.

    Texts that end a response are those of `StopTexts`.
    """
    if response and response[-1] in stops:
        return STOP_TOKEN
    return MAX_NEW_TOKENS if len(response) >= max_new_tokens else None


@dataclass(frozen=True, eq=False)
class Choice:
    """The next token of each row, on the device of the logits.

    Attributes:
        tokens: token ids `[batch]`, of the vocabulary in any case.
        is_finite: whether the largest logit is finite, `[batch]`: -inf is a probability of 0, NaN and +inf are not. It
            is NaN if any logit is.
    """

    tokens: NextTokens
    is_finite: Rows


def choose_tokens(logits: LastLogits, temperature: float, noise: Noise | None = None) -> Choice:
    """The next token of each row: the likeliest, or a draw from the softmax.

    A draw is the argmax of log probabilities plus Gumbel noise (Maddison, Tarlow and Minka 2014, "A* sampling"), first
    over groups of tokens and then over the tokens of the group drawn. So a draw takes `n_numbers` of noise instead of
    one number per token, and rounding changes it only where two candidates are equal up to rounding.

    Args:
        noise: the rows' noise, `[batch, n_numbers(d_vocab)]`; not used at temperature 0.
    """
    if temperature == 0:
        likeliest = logits.argmax(dim=-1, keepdim=True)
        return Choice(likeliest[:, 0], logits.gather(-1, likeliest)[:, 0].isfinite())
    assert noise is not None
    d_vocab, n_groups = logits.shape[-1], _n_groups(logits.shape[-1])
    largest = logits.amax(dim=-1, keepdim=True).float()
    temperature = min(max(temperature, _LOWEST_TEMPERATURE), _HIGHEST_TEMPERATURE)
    groups = _group_sums(logits, largest, temperature, n_groups).log_().add_(noise[:, :n_groups])
    # A group's tokens are n_groups apart.
    tokens = torch.arange(0, d_vocab, n_groups, device=logits.device) + groups.argmax(dim=-1, keepdim=True)
    inside = tokens.clamp(max=d_vocab - 1)
    scores = logits.gather(-1, inside).float().sub_(largest).div_(temperature).add_(noise[:, n_groups:])
    chosen = scores.masked_fill_(tokens >= d_vocab, -math.inf).argmax(dim=-1, keepdim=True)
    return Choice(inside.gather(-1, chosen)[:, 0], largest[:, 0].isfinite())


def n_numbers(d_vocab: int) -> int:
    """The count of random numbers for a draw from a vocabulary: one per group, and one per token of a group."""
    n_groups = _n_groups(d_vocab)
    return n_groups + math.ceil(d_vocab / n_groups)


def _n_groups(d_vocab: int) -> int:
    return math.isqrt(d_vocab - 1) + 1


def _group_sums(logits: LastLogits, largest: Tensor, temperature: float, n_groups: int) -> Tensor:
    """Sums `[batch, n_groups]` of the exponentials of each group's tokens, whose largest is 1 in every row."""
    n_rows, d_vocab = logits.shape
    n_whole = d_vocab // n_groups
    at_once = max(1, min(n_rows, _CPU_PIECE // d_vocab)) if logits.device.type == "cpu" else n_rows
    scratch = logits.new_empty(at_once, d_vocab, dtype=torch.float32)
    sums = scratch.new_empty(n_rows, n_groups)
    for start in range(0, n_rows, at_once):
        rows = slice(start, min(start + at_once, n_rows))
        terms = torch.sub(logits[rows], largest[rows], out=scratch[: rows.stop - start])
        terms.div_(temperature).exp_()
        torch.sum(terms[:, : n_whole * n_groups].unflatten(1, (n_whole, n_groups)), dim=1, out=sums[rows])
        sums[rows, : d_vocab - n_whole * n_groups] += terms[:, n_whole * n_groups :]
    return sums
