"""Steering: adding a trait's direction while the model generates, and scoring the effect without a judge.

    addend = coefficient * unit vector * typical residual norm

at `residual_out` of one layer, at every position from the last prompt token on.

`trait_mean` is 100 times the mean over questions of `p(positive) / (p(positive) + p(negative))`, where p
is the length-normalised likelihood `exp(mean log-probability per token)` of the question's positive or
negative completion under the steered model: 50 means that the two are equally likely. Comparing
completions by their length-normalised likelihood is how multiple-choice benchmarks are scored
(Brown et al., "Language Models are Few-Shot Learners", 2020; Gao et al., lm-evaluation-harness).

`coherence_mean` is 100 times the mean over questions of `exp(-excess)`, where excess is by how many nats per token
the unsteered model finds the steered response less likely than its own (at least 0).

Source of the addition: Turner et al., "Activation Addition" (2023); Rimsky et al., "Steering Llama 2 via
Contrastive Activation Addition" (2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from tlcapture.errors import InputError, NumericalError
from tlcapture.extraction.examples import only_known_keys
from tlcapture.generation.interventions.intervention import Add, Intervention, applied
from tlcapture.generation.loop import continue_from, prefill
from tlcapture.generation.outcomes import Failure, Outcome
from tlcapture.generation.padding import right_pad
from tlcapture.generation.sampling.next_token import GREEDY, STOP_TOKEN
from tlcapture.models.checkpoints.finite_weights import remedy
from tlcapture.models.loading import Model
from tlcapture.models.memory import bytes_per_prompt, free_memory
from tlcapture.prompts.tokenization import TokenizedPrompt, decode, place_response, unknown_token
from tlcapture.shapes import Mask, Tokens, Vector
from tlcapture.views.hooks import hook

NEW_TOKENS = 24
RANDOM_VECTORS = 20
_SHARE = 0.25  # of free memory for the rows of a batch

PerQuestion = Float[Tensor, " n_questions"]
PerRow = Float[Tensor, " batch"]


class Question(BaseModel):
    """An open question; for scoring by likelihoods, with completions that show the trait and its opposite."""

    model_config = ConfigDict(frozen=True)

    id: str = ""
    question: str = Field(min_length=1)
    positive: str | None = Field(default=None, min_length=1)
    negative: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _has_known_keys(cls, value: Any) -> Any:
        return only_known_keys(cls, value)

    @model_validator(mode="after")
    def _has_both_or_neither(self) -> Question:
        if (self.positive is None) != (self.negative is None):
            raise ValueError('expected both "positive" and "negative", or neither')
        if self.positive is not None and self.positive == self.negative:
            raise ValueError('"positive" and "negative" are the same, which no vector can tell apart')
        return self

    @property
    def completions(self) -> tuple[str, str] | None:
        """The positive and the negative completion, if it has them."""
        return None if self.positive is None or self.negative is None else (self.positive, self.negative)


class SteeringQuestions(BaseModel):
    """The content of `steering.json`.

    Questions are objects or plain strings, also as a bare list, and get their number as id where they have none. The
    fields are those of persona-vectors too: `eval_prompt` is what a judge is asked, with `{question}` and `{answer}` in
    it; `instruction` is not used.
    """

    model_config = ConfigDict(frozen=True)

    questions: list[Question] = Field(min_length=1)
    eval_prompt: str | None = None
    instruction: Any = None

    @model_validator(mode="before")
    @classmethod
    def _from_strings(cls, value: Any) -> Any:
        content = only_known_keys(cls, {"questions": value} if isinstance(value, list) else value)
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            return content
        asked = [{"question": each} if isinstance(each, str) else each for each in content["questions"]]
        numbered = [
            {**each, "id": each.get("id", str(number))} if isinstance(each, dict) else each
            for number, each in enumerate(asked, start=1)
        ]
        return {**content, "questions": numbered}

    @field_validator("questions")
    @classmethod
    def _differ(cls, value: list[Question]) -> list[Question]:
        seen: dict[tuple[str, str | None, str | None], int] = {}
        for number, each in enumerate(value, start=1):
            first = seen.setdefault((each.question, each.positive, each.negative), number)
            if first != number:
                raise ValueError(f"question {number} is the same as question {first}: expected each once")
        return value

    @field_validator("eval_prompt")
    @classmethod
    def _shows_the_answer(cls, value: str | None) -> str | None:
        if value is not None and "{answer}" not in value:
            raise ValueError("expected {answer} in it, in whose place the judge reads the response")
        return value


@dataclass(frozen=True, eq=False)
class SteeringScore:
    """Scores of one steering run and its responses, by question; scores are 0 to 1, their means 0 to 100.

    The trait's score of a question that was not scored is NaN, and no part of the mean.
    """

    trait: PerQuestion
    coherence: PerQuestion
    responses: list[str]

    @property
    def trait_mean(self) -> float:
        """100 times the mean over questions; 50 if positive and negative completions are equally likely."""
        return float(100 * self.trait.nanmean())

    @property
    def coherence_mean(self) -> float:
        """100 times the mean over questions; 100 if steering makes no response less likely."""
        return float(100 * self.coherence.mean())

    def standard_error(self, baseline: PerQuestion) -> float:
        """The standard error of the gain, in points, from the questions' differences from their baseline.

        NaN with fewer than two questions that have both scores.
        """
        gains = 100 * (self.trait - baseline)
        gains = gains[~gains.isnan()]
        return float(gains.std() / len(gains) ** 0.5) if len(gains) > 1 else float("nan")


@dataclass(frozen=True, eq=False)
class Addition:
    """A vector that is added at a layer, `coefficient` typical residual norms long."""

    layer: int
    vector: Vector
    coefficient: float


@dataclass(frozen=True)
class _Answers:
    """An answer per question: a state of each prompt up to its last token, which is not in it; that token and the
    answer's."""

    state: Any
    rows: list[list[int]]

    def repeated(self, copies: int) -> _Answers:
        """The same answers several times, one after the other."""
        return replace(self, rows=self.rows * copies)


class SteeringScorer:
    """Scores a model on a trait's questions while a vector steers it.

    The part that does not depend on steering is computed once: all prompt tokens except the last run once, and every
    pass continues from there.
    """

    def __init__(
        self, model: Model, prompts: Sequence[TokenizedPrompt], completions: Sequence[tuple[str, str] | None],
        *, new_tokens: int = NEW_TOKENS,
    ):  # fmt: skip
        """`completions` are the positive and the negative one of each prompt; responses have up to `new_tokens`.

        A prompt may have no completions: the trait's score is then NaN, to be replaced by a judge's.
        """
        self._model = model
        self._prompts = prompts
        self._new_tokens = new_tokens
        self._states: dict[tuple[tuple[int, ...], ...], Any] = {}
        own = self._respond()
        self._own_cost = self._cost(self._generated(own))
        self._positive, self._negative = (
            self._given([None if pair is None else pair[side] for pair in completions], own) for side in (0, 1)
        )
        self._is_scored = torch.tensor([pair is not None for pair in completions])
        self._norms: dict[int, float] = {}

    def typical_norm(self, layer: int) -> float:
        """The median norm of `residual_out` at a layer, unsteered, over the tokens at which steering acts.

        These are those of both completions and, once for each completion, the last one of each prompt. For an even
        number it is the lower of the middle two.

        A prompt without completions counts with the tokens of the model's own response.
        """
        if layer not in self._norms:
            norms = [self._residual_norms(layer, answers) for answers in (self._positive, self._negative)]
            self._norms[layer] = float(torch.cat(norms).median())
        return self._norms[layer]

    def scores(self, additions: Sequence[Addition]) -> list[SteeringScore]:
        """The scores under each addition; additions share batches, in which every row has its own addend.

        Raises `NumericalError` where the steered model's logits are NaN or inf.
        """
        return [score for batch in self._batches(additions) for score in self._score(len(batch), self._steer(batch))]

    def trait_scores(self, additions: Sequence[Addition]) -> list[PerQuestion]:
        """The likelihood scores of the trait under each addition, without responses."""
        return [score for batch in self._batches(additions) for score in self._trait(len(batch), self._steer(batch))]

    def baseline(self) -> SteeringScore:
        """The scores of the unsteered model; its coherence is 100 by definition."""
        return self._score(1, [])[0]

    def read(self, layer: int, texts: Sequence[str]) -> Float[Tensor, "n_questions d_model"]:
        """The mean `residual_out` of the unsteered model over each question's response; NaN for an empty one."""
        ids = [self._model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        answers = self._generated(ids)
        tokens, mask = right_pad(answers.rows)
        weights = mask[:, 1:].float()
        residual = self._residual_out(layer, tokens, mask, answers.state)[:, 1:].float().cpu()
        return torch.einsum("bpd,bp->bd", residual, weights) / weights.sum(dim=1, keepdim=True)

    def _batches(self, additions: Sequence[Addition]) -> Iterator[Sequence[Addition]]:
        """As many additions at a time as fit in memory."""
        texts = max(len(row) for row in (*self._positive.rows, *self._negative.rows))
        longest = max(len(prompt.token_ids) for prompt in self._prompts) + max(self._new_tokens, texts)
        one = len(self._prompts) * bytes_per_prompt(self._model, longest, [hook("residual_out", 0)])
        size = max(1, int(_SHARE * free_memory(self._model.device) / one))
        for start in range(0, len(additions), size):
            yield additions[start : start + size]

    def _steer(self, additions: Sequence[Addition]) -> list[Intervention]:
        """Interventions by row: all questions with the first addition, then all with the second, and so on."""
        by_layer: dict[int, Tensor] = {}
        n = len(self._prompts)
        for number, each in enumerate(additions):
            rows = by_layer.setdefault(each.layer, torch.zeros(n * len(additions), self._model.d_model))
            unit = torch.nn.functional.normalize(each.vector.float(), dim=0)
            rows[n * number : n * (number + 1)] = unit * each.coefficient * self.typical_norm(each.layer)
        return [Add(layer=layer, addend=rows) for layer, rows in by_layer.items()]

    def _trait(self, copies: int, interventions: Sequence[Intervention]) -> list[PerQuestion]:
        sides = (self._positive, self._negative)
        positive_cost, negative_cost = (self._cost(each.repeated(copies), interventions) for each in sides)
        found = (negative_cost - positive_cost).sigmoid().where(self._is_scored.repeat(copies), torch.nan)
        if not found[self._is_scored.repeat(copies)].isfinite().all():
            reason = remedy(self._model.dtype, self._model.name)
            raise NumericalError(f"steering: the model's logits are NaN or inf: {reason}")
        return list(found.split(len(self._prompts)))

    def _score(self, copies: int, interventions: Sequence[Intervention]) -> list[SteeringScore]:
        responses = self._respond(copies, interventions)
        excess = (self._cost(self._generated(responses)) - self._own_cost.repeat(copies)).clamp(min=0)
        texts = [decode(self._model.tokenizer, ids) for ids in responses]
        n = len(self._prompts)
        return [
            SteeringScore(trait, (-excess[n * number :][:n]).exp(), texts[n * number :][:n])
            for number, trait in enumerate(self._trait(copies, interventions))
        ]

    def _given(self, texts: Sequence[str | None], own: Sequence[Sequence[int]]) -> _Answers:
        """Given answers to the prompts, placed as the chat template places them.

        The model's own response takes the place of a missing one.
        """
        prefixes: list[tuple[int, ...]] = []
        answers: list[Sequence[int]] = []
        for prompt, text, response in zip(self._prompts, texts, own, strict=True):
            if text is None:
                prefixes.append(tuple(prompt.token_ids))
                answers.append(response)
                continue
            placed = place_response(
                self._model.tokenizer,
                prompt.source_text,
                text,
                system_prompt=prompt.system_prompt,
                chat_template=prompt.chat_template,
            )
            unknown = unknown_token(self._model.tokenizer, placed.token_ids, self._model.d_vocab)
            if unknown is not None:
                raise InputError(f"steering question {prompt.id}: {unknown}")
            prefixes.append(placed.token_ids[: placed.start])
            answers.append(placed.token_ids[placed.start :])
        return self._answers(tuple(prefixes), answers)

    def _generated(self, responses: Sequence[Sequence[int]]) -> _Answers:
        """The model's own responses, once or several times each, which follow the prompts directly."""
        return self._answers(self._prompt_ids, responses)

    def _answers(self, prefixes: tuple[tuple[int, ...], ...], texts: Sequence[Sequence[int]]) -> _Answers:
        rows = [[prefixes[row % len(prefixes)][-1], *text] for row, text in enumerate(texts)]
        return _Answers(self._state(prefixes), rows)

    @property
    def _prompt_ids(self) -> tuple[tuple[int, ...], ...]:
        return tuple(prompt.token_ids for prompt in self._prompts)

    def _state(self, prefixes: tuple[tuple[int, ...], ...]) -> Any:
        """The state of all tokens of the prefixes except the last, made once; with most templates all share it."""
        if prefixes not in self._states:
            prompts = [replace(prompt, token_ids=ids) for prompt, ids in zip(self._prompts, prefixes, strict=True)]
            self._states[prefixes] = prefill(self._model, prompts)
        return self._states[prefixes]

    def _branch(self, state: Any, copies: int) -> Any:
        return self._model.branch(state, [*range(len(self._prompts))] * copies)

    def _residual_norms(self, layer: int, answers: _Answers) -> Float[Tensor, " n_tokens"]:
        tokens, mask = right_pad(answers.rows)
        return self._residual_out(layer, tokens, mask, answers.state).float().norm(dim=-1)[mask.bool()]

    def _residual_out(self, layer: int, tokens: Tokens, mask: Mask, state: Any) -> Float[Tensor, "batch pos d_model"]:
        name = hook("residual_out", layer)
        branch = self._branch(state, len(tokens) // len(self._prompts))
        return self._model.step(tokens, mask, branch, {name}, want_logits=False).cache[name]

    def _cost(self, answers: _Answers, interventions: Sequence[Intervention] = ()) -> PerRow:
        """Nats per token of answers to the questions, once or several times each; 0 for an empty one."""
        tokens, mask = right_pad(answers.rows)
        with applied(self._model, interventions):
            residual = self._residual_out(self._model.n_layers - 1, tokens, mask, answers.state)
        n = len(self._prompts)  # the logits of all rows together may not fit in memory
        parts = zip(residual[:, :-1].split(n), tokens[:, 1:].split(n), strict=True)
        costs = torch.cat([self._costs_of(*part) for part in parts])
        counts = mask[:, 1:].sum(dim=1)
        return (costs * mask[:, 1:]).sum(dim=1) / counts.clamp(min=1)

    def _costs_of(self, residual: Tensor, tokens: Tokens) -> Float[Tensor, "batch pos"]:
        logits = self._model.unembed(residual).float()
        targets = tokens.to(logits.device)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu()

    def _respond(self, copies: int = 1, interventions: Sequence[Intervention] = ()) -> list[tuple[int, ...]]:
        """The greedy responses to the questions, without stop tokens, once for every copy."""
        outcomes = continue_from(
            self._model,
            self._branch(self._state(self._prompt_ids), copies),
            [*self._prompts] * copies,
            max_new_tokens=self._new_tokens,
            sampling=GREEDY,
            interventions=interventions,
        )
        return [_response(outcome) for outcome in outcomes]


def _response(outcome: Outcome) -> tuple[int, ...]:
    if isinstance(outcome, Failure):
        raise outcome.error(f"steering question {outcome.prompt.id}: {outcome.reason}")
    ids = outcome.response_ids
    return ids[:-1] if outcome.stop_reason == STOP_TOKEN else ids
