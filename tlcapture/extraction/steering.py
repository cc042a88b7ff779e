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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from tlcapture.generation.interventions import Intervention, Steer, applied
from tlcapture.generation.loop import continue_from, prefill
from tlcapture.generation.outcomes import Failure, Outcome
from tlcapture.generation.padding import right_pad
from tlcapture.generation.sampling import GREEDY, STOP_TOKEN
from tlcapture.models.loading import Model
from tlcapture.prompts.tokenization import TokenizedPrompt, decode
from tlcapture.shapes import Mask, Tokens, Vector
from tlcapture.views.hooks import hook

NEW_TOKENS = 24

PerQuestion = Float[Tensor, " n_questions"]


class Question(BaseModel):
    """An open question, and where likelihoods are to score it, completions that show the trait and its opposite."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = ""
    question: str = Field(min_length=1)
    positive: str | None = Field(default=None, min_length=1)
    negative: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _has_both_or_neither(self) -> Question:
        if (self.positive is None) != (self.negative is None):
            raise ValueError('expected both "positive" and "negative", or neither')
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

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: list[Question] = Field(min_length=1)
    eval_prompt: str | None = None
    instruction: Any = None

    @model_validator(mode="before")
    @classmethod
    def _from_strings(cls, value: Any) -> Any:
        content = {"questions": value} if isinstance(value, list) else value
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            return content
        asked = [{"question": each} if isinstance(each, str) else each for each in content["questions"]]
        numbered = [
            {**each, "id": each.get("id", str(number))} if isinstance(each, dict) else each
            for number, each in enumerate(asked, start=1)
        ]
        return {**content, "questions": numbered}

    @field_validator("eval_prompt")
    @classmethod
    def _shows_the_answer(cls, value: str | None) -> str | None:
        if value is not None and "{answer}" not in value:
            raise ValueError("expected {answer} in it, in whose place the judge reads the response")
        return value


@dataclass(frozen=True)
class SteeringScore:
    """Scores of one steering run and its responses, by question; scores are 0 to 1, their means 0 to 100.

    The trait's score of a question that was not scored is NaN, and no part of the mean.
    """

    trait: PerQuestion
    coherence: PerQuestion
    responses: list[str]

    @property
    def trait_mean(self) -> float:
        """100 times the mean over questions; 50 where positive and negative completion are equally likely."""
        return float(100 * self.trait.nanmean())

    @property
    def coherence_mean(self) -> float:
        """100 times the mean over questions; 100 where steering makes no response less likely."""
        return float(100 * self.coherence.mean())


class SteeringScorer:
    """Scores a model on a trait's questions while a vector steers it.

    Computes once what does not depend on steering: all prompt tokens but the last run once, and every
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
        self._prefilled = prefill(model, prompts)
        own = self._respond()
        self._own_cost = self._cost(own)
        # Where there are no completions, the model's own response takes their place in the typical norm.
        texts = [
            [list(ids)] * 2 if pair is None else [self._ids(text) for text in pair]
            for pair, ids in zip(completions, own, strict=True)
        ]
        self._positive, self._negative = ([pair[side] for pair in texts] for side in (0, 1))
        self._is_scored = torch.tensor([pair is not None for pair in completions])
        self._norms: dict[int, float] = {}

    def typical_norm(self, layer: int) -> float:
        """The median norm of `residual_out` at a layer over the tokens of both completions, unsteered.

        A prompt without completions counts with the tokens of the model's own response.
        """
        if layer not in self._norms:
            norms = [self._residual_norms(layer, texts) for texts in (self._positive, self._negative)]
            self._norms[layer] = float(torch.cat(norms).median())
        return self._norms[layer]

    def score(self, layer: int, vector: Vector, coefficient: float) -> SteeringScore:
        """The scores under steering at a layer with `coefficient` typical residual norms along the vector.

        Raises `NumericalError` where the steered model's logits are NaN or inf.
        """
        addend = torch.nn.functional.normalize(vector.float(), dim=0) * coefficient * self.typical_norm(layer)
        return self._score([Steer(layer, addend)])

    def baseline(self) -> SteeringScore:
        """The scores of the unsteered model; its coherence is 100 by definition."""
        return self._score([])

    def _score(self, interventions: Sequence[Intervention]) -> SteeringScore:
        positive_cost, negative_cost = (self._cost(each, interventions) for each in (self._positive, self._negative))
        responses = self._respond(interventions)
        excess = (self._cost(responses) - self._own_cost).clamp(min=0)
        texts = [decode(self._model.tokenizer, ids) for ids in responses]
        trait = (negative_cost - positive_cost).sigmoid().where(self._is_scored, torch.nan)
        return SteeringScore(trait, (-excess).exp(), texts)

    def _ids(self, text: str) -> list[int]:
        return list(self._model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _branch(self) -> Any:
        return self._model.branch(self._prefilled, range(len(self._prompts)))

    def _after_prompts(self, texts: Sequence[Sequence[int]]) -> tuple[Tokens, Mask]:
        """The last prompt token of each question and a text after it, to run from a branch."""
        return right_pad([[prompt.token_ids[-1], *ids] for prompt, ids in zip(self._prompts, texts, strict=True)])

    def _residual_norms(self, layer: int, texts: Sequence[Sequence[int]]) -> Float[Tensor, " n_tokens"]:
        tokens, mask = self._after_prompts(texts)
        return self._residual_out(layer, tokens, mask).float().norm(dim=-1)[mask.bool()]

    def _residual_out(self, layer: int, tokens: Tokens, mask: Mask) -> Float[Tensor, "batch pos d_model"]:
        name = hook("residual_out", layer)
        return self._model.step(tokens, mask, self._branch(), {name}, want_logits=False).cache[name]

    def _cost(self, texts: Sequence[Sequence[int]], interventions: Sequence[Intervention] = ()) -> PerQuestion:
        """Nats per token of a text after each question's prompt; 0 for an empty text."""
        tokens, mask = self._after_prompts(texts)
        with applied(self._model, interventions):
            residual = self._residual_out(self._model.n_layers - 1, tokens, mask)
        logits = self._model.unembed(residual[:, :-1]).float()
        costs = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
        ).cpu()
        counts = mask[:, 1:].sum(dim=1)
        return (costs * mask[:, 1:]).sum(dim=1) / counts.clamp(min=1)

    def _respond(self, interventions: Sequence[Intervention] = ()) -> list[tuple[int, ...]]:
        """The greedy response to each question, without its stop token."""
        outcomes = continue_from(
            self._model,
            self._branch(),
            self._prompts,
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
