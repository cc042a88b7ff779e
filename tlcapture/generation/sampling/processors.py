"""Rules that change the logits before a token is chosen: penalties, suppressed and forced tokens, top-k, top-p, ...

The rules are those of Hugging Face's `generate`, under its names and in its order, computed by its public classes.
Rules that depend on a prompt's own tokens are applied row by row, without the padding. Only the repetition
penalty, which many checkpoints set, is computed here, for the whole batch on its device; and on a CPU top-p, which
generate finds by sorting the vocabulary, in `top_p`.

Source of the order: `GenerationMixin._get_logits_processor` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlcapture.generation.sampling.top_p import TopP
from tlcapture.models.streams import upload
from tlcapture.shapes import LastLogits, NextTokens

Processor = Callable[[Any, Tensor], Tensor]
_LOW_TEMPERATURE = 1e-3


def plain(value: Any) -> Any:
    """A number or text of NumPy as one of Python's: with NumPy's own, a capture could not be opened again."""
    return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


_VALID: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "repetition_penalty": ("a number above 0", lambda value: is_number(value) and value > 0),
    "top_k": ("a whole number of at least 0", lambda value: type(value) is int and value >= 0),
    "top_p": ("a number from 0 to 1", _is_share),
    "min_p": ("a number from 0 to 1", _is_share),
}


@dataclass(frozen=True)
class LogitRules:
    """Rules in the order in which they apply, with the names and values of a generation config; `None` means no rule.

    Rules from `top_h` on limit sampling, after the temperature; a greedy choice ignores them.

    Raises `ValueError` for an invalid repetition penalty, top-k, top-p or min-p.
    """

    sequence_bias: Any = None
    encoder_repetition_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: Any = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Any = None
    exponential_decay_length_penalty: Any = None
    suppress_tokens: Any = None
    begin_suppress_tokens: Any = None
    top_h: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None

    def __post_init__(self) -> None:
        for name, (expected, is_valid) in _VALID.items():
            value = plain(getattr(self, name))
            if value is not None and not is_valid(value):
                raise ValueError(f"{name} {value!r}: expected {expected}")
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(tuple(self.active(greedy=False)))  # of names: values of a generation config may be lists

    def active(self, *, greedy: bool) -> dict[str, Any]:
        """The rules that are set, by name, without those for sampling if the choice is greedy."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in found.items() if value is not None and not (greedy and name in FOR_SAMPLING)
        }


FOR_SAMPLING = ("top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
NO_RULES = LogitRules()


@dataclass(frozen=True)
class PromptTokens:
    """The data of one prompt that rules depend on: its token ids, stop ids, and its response's maximum length."""

    token_ids: Sequence[int]
    stops: frozenset[int]
    max_new_tokens: int


class LogitProcessors:
    """Applies rules to the logits of a batch, step by step.

    Prompts and responses are kept on the device of the logits, one row per running prompt: `append` adds a step's
    tokens, `keep` drops rows.

    Args:
        rules: the rules.
        temperature: 0 is greedy.
        prompts: all prompts of the batch.
    """

    def __init__(self, rules: LogitRules, temperature: float, prompts: Sequence[PromptTokens]):
        self._rules = rules.active(greedy=temperature == 0)
        self._temperature = temperature
        self._prompts = prompts
        self._rows = list(range(len(prompts)))  # the prompt in each row
        self._responses: list[NextTokens] = []  # by step
        self._prompt_ids: dict[int, Tensor] = {}
        self._made: dict[tuple[str, int], Processor] = {}
        self._seen: Tensor | None = None  # the tokens of each row, as indices of its flattened logits

    def __bool__(self) -> bool:
        return bool(self._rules)

    def __call__(self, logits: LastLogits) -> LastLogits:
        """Logits of the running prompts in float32 after all rules, divided by the temperature unless that is 0."""
        scores = logits.float()
        for name in self._rules:
            if name in FOR_SAMPLING:
                continue
            if name == "repetition_penalty":
                scores = self._penalised(scores)
            elif name in _FOR_BATCH:
                scores = self._for_batch(name, scores)
            else:
                scores = self._row_by_row(name, scores)
        if self._temperature:
            # With 0 as the largest, a low temperature does not overflow; one beyond float32 would give NaN.
            if self._temperature < _LOW_TEMPERATURE:
                scores = scores - scores.amax(dim=-1, keepdim=True)
            scores = scores / min(max(self._temperature, 1e-20), 1e30)
        for name in self._rules:
            if name in FOR_SAMPLING:
                scores = self._for_batch(name, scores)
        return scores

    def append(self, tokens: NextTokens) -> None:
        """Add the token chosen for each running prompt."""
        if self._rules:
            self._responses.append(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows except those with these indices."""
        self._rows = [self._rows[row] for row in rows]
        self._responses = [tokens.index_select(0, upload(rows, tokens.device)) for tokens in self._responses]
        self._seen = None

    def _for_batch(self, name: str, scores: LastLogits) -> LastLogits:
        if (name, 0) not in self._made:
            self._made[name, 0] = _FOR_BATCH[name](self._rules[name], scores.device)
        return self._made[name, 0](None, scores)

    def _row_by_row(self, name: str, scores: LastLogits) -> LastLogits:
        changed = []
        for ids, row, own in zip(self._ids(scores.device), self._rows, scores.split(1), strict=True):
            if (name, row) not in self._made:
                self._made[name, row] = _FOR_ROW[name](self._rules[name], self._prompts[row], scores.device)
            changed.append(self._made[name, row](ids, own))
        return torch.cat(changed)

    def _ids(self, device: torch.device) -> Iterator[Tensor]:
        """The tokens so far of each running prompt, `[1, n_tokens]`."""
        responses = torch.stack(self._responses, dim=1) if self._responses else None
        for number, row in enumerate(self._rows):
            if row not in self._prompt_ids:
                self._prompt_ids[row] = _ids(self._prompts[row], device)
            ids = self._prompt_ids[row]
            yield ids if responses is None else torch.cat([ids, responses[number : number + 1]], dim=1)

    def _penalised(self, scores: LastLogits) -> LastLogits:
        """Divide positive logits of tokens that a row already has by the penalty, and multiply negative ones by it."""
        penalty, d_vocab = self._rules["repetition_penalty"], scores.shape[1]
        new = self._responses[-1:] if self._seen is not None else self._responses
        starts = torch.arange(0, scores.numel(), d_vocab, device=scores.device)
        seen = [self._in_prompts(scores) if self._seen is None else self._seen, *(starts + tokens for tokens in new)]
        self._seen = torch.cat(seen)
        flat = scores.reshape(-1)
        found = flat.index_select(0, self._seen)
        # A token that a row has twice gets the same value twice.
        changed = flat.index_copy(0, self._seen, torch.where(found < 0, found * penalty, found / penalty))
        return changed.view(scores.shape)

    def _in_prompts(self, scores: LastLogits) -> Tensor:
        """The tokens of running prompts `[n]` that have logits; an embedding may have more rows."""
        d_vocab = scores.shape[1]
        known = [
            number * d_vocab + token
            for number, row in enumerate(self._rows)
            for token in sorted(set(self._prompts[row].token_ids))
            if token < d_vocab
        ]
        return upload(known, scores.device)


def _classes() -> Any:
    import transformers

    return transformers


def _stops(prompt: PromptTokens, device: torch.device) -> Tensor:
    return upload(sorted(prompt.stops), device)


def _ids(prompt: PromptTokens, device: torch.device) -> Tensor:
    return upload(prompt.token_ids, device)[None]


def _of_finite_rows(process: Processor) -> Processor:
    """A processor that raises an error for NaN and infinity, applied to the other rows; those with them get NaN."""

    def apply(ids: Any, scores: Tensor) -> Tensor:
        broken = ~scores.amax(dim=-1, keepdim=True).isfinite()
        return process(ids, scores.masked_fill(broken, 0)).masked_fill(broken, torch.nan)

    return apply


# Makers of Hugging Face's processors that are the same for all rows ...
_FOR_BATCH: dict[str, Callable[[Any, torch.device], Processor]] = {
    "suppress_tokens": lambda value, device: _classes().SuppressTokensLogitsProcessor(value, device=device),
    "top_h": lambda value, device: _of_finite_rows(_classes().TopHLogitsWarper(top_h=value)),
    "top_k": lambda value, device: _classes().TopKLogitsWarper(top_k=value),
    "top_p": lambda value, device: TopP(value),
    "min_p": lambda value, device: _classes().MinPLogitsWarper(min_p=value),
    "typical_p": lambda value, device: _classes().TypicalLogitsWarper(mass=value),
    "epsilon_cutoff": lambda value, device: _classes().EpsilonLogitsWarper(epsilon=value),
    "eta_cutoff": lambda value, device: _of_finite_rows(_classes().EtaLogitsWarper(epsilon=value, device=device)),
}

# ... and of those that read the ids of a row.
_FOR_ROW: dict[str, Callable[[Any, PromptTokens, torch.device], Processor]] = {
    "sequence_bias": lambda value, prompt, device: _classes().SequenceBiasLogitsProcessor(sequence_bias=value),
    "encoder_repetition_penalty": lambda value, prompt, device: _classes().EncoderRepetitionPenaltyLogitsProcessor(
        penalty=value, encoder_input_ids=_ids(prompt, device)
    ),
    "no_repeat_ngram_size": lambda value, prompt, device: _classes().NoRepeatNGramLogitsProcessor(value),
    "encoder_no_repeat_ngram_size": lambda value, prompt, device: _classes().EncoderNoRepeatNGramLogitsProcessor(
        value, _ids(prompt, device)
    ),
    "bad_words_ids": lambda value, prompt, device: _classes().NoBadWordsLogitsProcessor(value, _stops(prompt, device)),
    "min_length": lambda value, prompt, device: _classes().MinLengthLogitsProcessor(
        value, _stops(prompt, device), device=device
    ),
    "min_new_tokens": lambda value, prompt, device: _classes().MinNewTokensLengthLogitsProcessor(
        len(prompt.token_ids), value, _stops(prompt, device), device=device
    ),
    "forced_bos_token_id": lambda value, prompt, device: _classes().ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, prompt, device: _classes().ForcedEOSTokenLogitsProcessor(
        len(prompt.token_ids) + prompt.max_new_tokens, value, device=device
    ),
    "exponential_decay_length_penalty": lambda value, prompt, device: _classes().ExponentialDecayLengthPenalty(
        value, _stops(prompt, device), len(prompt.token_ids)
    ),
    "begin_suppress_tokens": lambda value, prompt, device: _classes().SuppressTokensAtBeginLogitsProcessor(
        value, len(prompt.token_ids), device=device
    ),
}
