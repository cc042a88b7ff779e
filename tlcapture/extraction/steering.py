"""Steering: adding a trait's direction while the model writes, and scoring what it does without a judge.

    addend = coefficient * unit vector * typical residual norm

at `residual_out` of one layer, at every position from the last prompt token on.

`trait_mean` is 100 times the mean over questions of `p(positive) / (p(positive) + p(negative))`, where p
is the length-normalised likelihood `exp(mean log-probability a token)` of the question's positive or
negative completion under the steered model: 50 means that steering makes neither likelier. Comparing
completions by their length-normalised likelihood is how multiple-choice benchmarks are scored
(Brown et al., "Language Models are Few-Shot Learners", 2020; Gao et al., lm-evaluation-harness).

`coherence_mean` is 100 times the mean over questions of `exp(-excess)`, where excess is how many nats a
token the unsteered model finds the steered response worse than its own (never below 0).

Source of the addition: Turner et al., "Activation Addition" (2023); Rimsky et al., "Steering Llama 2 via
Contrastive Activation Addition" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tlcapture.models.loading import Model
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt, decode
from tlcapture.shapes import Vector
from tlcapture.views.hooks import hook

NEW_TOKENS = 24


class Question(BaseModel):
    """An open question with a completion that shows the trait and one that shows its opposite."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    question: str = Field(min_length=1)
    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)


class SteeringQuestions(BaseModel):
    """The content of `steering.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: list[Question] = Field(min_length=1)


@dataclass(frozen=True)
class SteeringScore:
    """Scores of one steering run, by question; the means are 0 to 100."""

    trait: Float[Tensor, " n_questions"]
    coherence: Float[Tensor, " n_questions"]
    responses: list[str]

    @property
    def trait_mean(self) -> float:
        return float(100 * self.trait.mean())

    @property
    def coherence_mean(self) -> float:
        return float(100 * self.coherence.mean())


class SteeringBench:
    """A trait's questions on a model, with what does not depend on steering computed once.

    All prompts but their last token run once; steered passes start from there.
    """

    def __init__(
        self, model: Model, prompts: Sequence[TokenizedPrompt], completions: Sequence[tuple[str, str]],
        *, new_tokens: int = NEW_TOKENS,
    ):  # fmt: skip
        self._model = model
        self._new_tokens = new_tokens
        self._stops = stop_ids(model.tokenizer, model.generation_config)
        self._last = [prompt.token_ids[-1] for prompt in prompts]
        self._completions = [tuple(self._ids(text) for text in pair) for pair in completions]
        self._state = self._prefill([prompt.token_ids[:-1] for prompt in prompts])
        _, self._own_cost = self._respond()
        self._norms: dict[int, float] = {}

    def typical_norm(self, layer: int) -> float:
        """The median length of `residual_out` at a layer over the tokens of both completions, unsteered."""
        if layer not in self._norms:
            self._norms[layer] = self._median_norm(layer)
        return self._norms[layer]

    def _median_norm(self, layer: int) -> float:
        name = hook("residual_out", layer)
        lengths = []
        for side in (0, 1):
            tokens, mask = self._pad([pair[side] for pair in self._completions])
            cache = self._step(tokens, mask, name)
            lengths.append(cache.float().norm(dim=-1)[mask.bool()])
        return float(torch.cat(lengths).median())

    def score(self, layer: int, vector: Vector, coefficient: float) -> SteeringScore:
        """Steer at a layer with `coefficient` typical residual norms along the vector, and score it."""
        addend = torch.nn.functional.normalize(vector.float(), dim=0) * coefficient * self.typical_norm(layer)
        return self._score(lambda: self._model.steered(layer, lambda activation: addend))

    def baseline(self) -> SteeringScore:
        """The scores of the model as it is; its coherence is 100 by definition."""
        return self._score(nullcontext)

    def _score(self, steering: Callable[[], Any]) -> SteeringScore:
        with steering():
            costs = [self._cost([pair[side] for pair in self._completions]) for side in (0, 1)]
            responses, _ = self._respond(measure=False)
        excess = (self._cost(responses) - self._own_cost).clamp(min=0)
        texts = [decode(self._model.tokenizer, ids) for ids in responses]
        return SteeringScore((costs[1] - costs[0]).sigmoid(), (-excess).exp(), texts)

    def _ids(self, text: str) -> list[int]:
        return list(self._model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Any:
        width = max(map(len, prompts))
        tokens, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        state = self._model.start(len(prompts))
        self._model.step(tokens, mask, state, frozenset(), want_logits=False)
        return state

    def _branch(self) -> Any:
        return self._model.branch(self._state, range(len(self._last)))

    def _pad(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The last prompt token and a text's tokens, padded at the end, and their mask."""
        width = 1 + max(map(len, texts))
        tokens, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
        for row, (last, ids) in enumerate(zip(self._last, texts, strict=True)):
            tokens[row, : 1 + len(ids)] = torch.tensor([last, *ids])
            mask[row, : 1 + len(ids)] = 1
        return tokens, mask

    def _step(self, tokens: Tensor, mask: Tensor, name: str) -> Tensor:
        return self._model.step(tokens, mask, self._branch(), {name}, want_logits=False).cache[name]

    def _cost(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, " n_questions"]:
        """Nats a token of a text behind each question's prompt; 0 for an empty one."""
        tokens, mask = self._pad(texts)
        residual = self._step(tokens, mask, hook("residual_out", self._model.n_layers - 1))
        logits = self._model.unembed(residual[:, :-1]).float()
        costs = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
        ).cpu()
        counts = mask[:, 1:].sum(dim=1)
        return (costs * mask[:, 1:]).sum(dim=1) / counts.clamp(min=1)

    def _respond(self, *, measure: bool = True) -> tuple[list[list[int]], Float[Tensor, " n_questions"]]:
        """Greedy responses of a fixed length or up to a stop token, and what they cost the model as it is now."""
        state, tokens = self._branch(), torch.tensor(self._last)[:, None]
        responses: list[list[int]] = [[] for _ in self._last]
        going = [True] * len(responses)
        for _ in range(self._new_tokens):
            step = self._model.step(tokens, torch.ones_like(tokens), state, frozenset(), want_logits=True)
            assert step.logits is not None
            chosen = step.logits.argmax(dim=-1).tolist()
            for row, token in enumerate(chosen):
                going[row] = going[row] and token not in self._stops
                if going[row]:
                    responses[row].append(token)
            if not any(going):
                break
            tokens = torch.tensor(chosen)[:, None]
        return responses, self._cost(responses) if measure else torch.zeros(len(responses))
