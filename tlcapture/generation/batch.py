"""Prompts that run together: forward passes, one token per prompt and pass, until every prompt has an outcome."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture.errors import NumericalError
from tlcapture.generation.interventions import LAST_POSITION, Intervention, applied
from tlcapture.generation.noise import GumbelNoise, stream_start
from tlcapture.generation.outcomes import Failure, Generation, Outcome
from tlcapture.generation.padding import left_pad
from tlcapture.generation.processors import LogitProcessors, PromptTokens
from tlcapture.generation.recording import Recorder
from tlcapture.generation.sampling import MAX_NEW_TOKENS, Sampling, choose_tokens, n_numbers, stop_reason
from tlcapture.generation.transfers import Download, upload
from tlcapture.models.engines.base import Step
from tlcapture.models.loading import Model
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import LastLogits, Mask, NextTokens, Tokens

Ended = dict[int, str | None]  # why prompts have ended, by index; `None`: their logits are not finite
Outcomes = deque[tuple[int, Outcome]]


@dataclass(frozen=True)
class Settings:
    """How prompts are run: the activations to record, the length and choice of responses, and interventions.

    Interventions act from the last prompt token on.
    """

    hooks: Sequence[str] = ()
    max_new_tokens: int = 50
    sampling: Sampling = Sampling()
    interventions: Sequence[Intervention] = ()


class Batch:
    """One run of a batch. `run` and `continue_from` are alternatives, and each batch runs once.

    Both yield each prompt's index and outcome as soon as the prompt has ended, and call `on_tokens` after each choice
    of tokens with the indices of the prompts that got one.
    """

    def __init__(self, model: Model, prompts: Sequence[TokenizedPrompt], settings: Settings):
        self._model = model
        self._prompts = prompts
        self._settings = settings
        self._interventions = settings.interventions  # for the running prompts
        self._stops = {
            templated: stop_ids(model.tokenizer, model.generation_config, chat_template=templated)
            for templated in {prompt.chat_template for prompt in prompts}
        }
        self._recorder = Recorder(settings.hooks, [len(p.token_ids) for p in prompts], settings.max_new_tokens)
        self._noise: GumbelNoise | None = None  # made when the vocabulary and the device of the logits are known
        self._processors = LogitProcessors(
            settings.sampling.rules,
            settings.sampling.temperature,
            [PromptTokens(p.token_ids, self._stops[p.chat_template], settings.max_new_tokens) for p in prompts],
        )
        self._responses: list[list[int]] = [[] for _ in prompts]
        self._n_new = 0  # tokens of every response that is still running
        self._running = list(range(len(prompts)))  # the prompt in each row of the state
        self._state: Any = None

    def run(self, on_tokens: Callable[[Sequence[int]], None]) -> Iterator[tuple[int, Outcome]]:
        """Run the prompts from their first token on."""
        self._state = self._model.start(len(self._prompts))
        longest = max(len(prompt.token_ids) for prompt in self._prompts)
        self._model.reserve(self._state, longest + self._settings.max_new_tokens)
        yield from self._respond(self._read_prompts(), on_tokens)

    def continue_from(self, state: Any, on_tokens: Callable[[Sequence[int]], None]) -> Iterator[tuple[int, Outcome]]:
        """Run from a state of all prompt tokens but the last, which is extended; the settings name no hooks."""
        assert not self._settings.hooks, "the activations of the tokens in a state are gone"
        self._state = state
        tokens = torch.tensor([[prompt.token_ids[-1]] for prompt in self._prompts])
        yield from self._respond(self._step(tokens, torch.ones_like(tokens), want_logits=True).logits, on_tokens)

    def _respond(
        self, logits: LastLogits | None, on_tokens: Callable[[Sequence[int]], None]
    ) -> Iterator[tuple[int, Outcome]]:
        """Choose and run tokens, which stay on the device: main memory gets a copy while they are being run.

        Outcomes are yielded while the next tokens are being run.
        """
        if not self._settings.max_new_tokens:
            yield from _handed_out(self._outcomes(dict.fromkeys(self._running, MAX_NEW_TOKENS)))
            return
        outcomes: Outcomes = deque()
        while self._running:
            assert logits is not None
            try:
                tokens, copy = self._choose(logits)
                logits = self._run_tokens(tokens)
            except Exception:
                yield from _handed_out(outcomes)
                raise
            yield from _handed_out(outcomes)
            ended = self._read_choice(copy.read(), on_tokens)
            outcomes = self._outcomes(ended)
            logits = self._keep([index not in ended for index in self._running], logits)
        yield from _handed_out(outcomes)

    def _choose(self, logits: LastLogits) -> tuple[NextTokens, Download]:
        """Choose the next token of each running prompt; the copy has -1 where the logits are not finite."""
        sampling = self._settings.sampling
        temperature = sampling.temperature
        if self._processors:
            logits = self._processors(logits)
            temperature = 1.0 if temperature else 0  # the processors have divided by it
        if temperature and self._noise is None:
            starts = [stream_start(sampling.seed, self._prompts[index]) for index in self._running]
            width = n_numbers(logits.shape[-1])
            self._noise = GumbelNoise(starts, width, self._settings.max_new_tokens, logits.device)
        choice = choose_tokens(logits, temperature, None if self._noise is None else self._noise.next())
        self._processors.append(choice.tokens)
        self._n_new += 1
        return choice.tokens, Download(torch.where(choice.is_finite, choice.tokens, -1))

    def _read_choice(self, tokens: Sequence[int], on_tokens: Callable[[Sequence[int]], None]) -> Ended:
        """Extend the responses; the prompts that have ended."""
        chosen = {index: token for index, token in zip(self._running, tokens, strict=True) if token >= 0}
        for index, token in chosen.items():
            self._responses[index].append(token)
        if chosen:
            on_tokens(list(chosen))
        reasons = {index: self._stop_reason(index) if index in chosen else None for index in self._running}
        return {index: reason for index, reason in reasons.items() if reason is not None or index not in chosen}

    def _stop_reason(self, index: int) -> str | None:
        stops = self._stops[self._prompts[index].chat_template]
        return stop_reason(self._responses[index], stops, self._settings.max_new_tokens)

    def _keep(self, stays: Sequence[bool], logits: LastLogits | None) -> Tensor | None:
        """Drop the rows of prompts that have ended; the logits of the others."""
        if all(stays):
            return logits
        kept = [row for row, stay in enumerate(stays) if stay]
        self._running = [self._running[row] for row in kept]
        if logits is None or not kept:
            return None
        rows = torch.tensor(stays)
        self._model.keep(self._state, rows)
        self._interventions = [each.of_rows(rows) for each in self._interventions]
        self._processors.keep(kept)
        if self._noise is not None:
            self._noise.keep(kept)
        return logits.index_select(0, upload(kept, logits.device))

    def _read_prompts(self) -> LastLogits:
        tokens, mask = left_pad([prompt.token_ids for prompt in self._prompts])
        last_logits = []
        with applied(self._model, self._interventions, LAST_POSITION):
            for rows, step in self._model.prompt_steps(tokens, mask, self._state, self._recorder.names):
                self._recorder.record(self._running[rows], step.cache)
                last_logits.append(step.logits)
        return torch.cat([each for each in last_logits if each is not None])

    def _run_tokens(self, chosen: NextTokens) -> LastLogits | None:
        """Run the tokens just chosen, the last ones of responses too, whose activations are recorded; the logits
        if any response may go on."""
        may_go_on = self._n_new < self._settings.max_new_tokens
        if not may_go_on and not self._settings.hooks:
            return None
        tokens = chosen[:, None]
        step = self._step(tokens, torch.ones_like(tokens), want_logits=may_go_on)
        self._recorder.record(self._running, step.cache)
        return step.logits

    def _step(self, tokens: Tokens, mask: Mask, *, want_logits: bool) -> Step:
        with applied(self._model, self._interventions, LAST_POSITION):
            return self._model.step(tokens, mask, self._state, self._recorder.names, want_logits=want_logits)

    def _outcomes(self, ended: Ended) -> Outcomes:
        """The outcomes of prompts that have ended, whose activations begin to leave the device."""
        return deque(
            (index, self._not_finite(index) if reason is None else self._generation(index, reason))
            for index, reason in ended.items()
        )

    def _generation(self, index: int, reason: str) -> Generation:
        return Generation(self._prompts[index], tuple(self._responses[index]), reason, self._recorder.take(index))

    def _not_finite(self, index: int) -> Failure:
        position = len(self._prompts[index].token_ids) + len(self._responses[index])
        reason = f"the model's logits are NaN or inf at token {position}: try --dtype float32"
        return Failure(self._prompts[index], reason, NumericalError)


def _handed_out(outcomes: Outcomes) -> Iterator[tuple[int, Outcome]]:
    """The outcomes, of which none is kept."""
    while outcomes:
        yield outcomes.popleft()
