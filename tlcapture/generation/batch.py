"""Prompts that run together: forward passes, one token per prompt and pass, until every prompt has an outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlcapture.errors import NumericalError
from tlcapture.generation.interventions import LAST_POSITION, Intervention, applied
from tlcapture.generation.outcomes import Failure, Generation, Outcome
from tlcapture.generation.padding import left_pad
from tlcapture.generation.processors import LogitProcessors, PromptTokens
from tlcapture.generation.recording import Recorder
from tlcapture.generation.sampling import Sampling, choose_tokens, prompt_generator, stop_reason
from tlcapture.models.engines.base import Step
from tlcapture.models.loading import Model
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import LastLogits, Mask, Tokens


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
        self._generators = [prompt_generator(settings.sampling.seed, prompt) for prompt in prompts]
        self._processors = LogitProcessors(
            settings.sampling.rules,
            settings.sampling.temperature,
            [PromptTokens(p.token_ids, self._stops[p.chat_template], settings.max_new_tokens) for p in prompts],
        )
        self._responses: list[list[int]] = [[] for _ in prompts]
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
        while True:
            reasons = self._stop_reasons()
            for index, reason in zip(self._running, reasons, strict=True):
                if reason is not None:
                    yield index, self._generation(index, reason)
            if None not in reasons:
                return
            assert logits is not None
            if self._processors:
                logits = self._processors(logits, self._running, self._responses)
            finite = logits.amax(dim=-1).isfinite().tolist()  # -inf is a probability of 0, NaN and +inf are not
            stays = [reason is None and is_finite for reason, is_finite in zip(reasons, finite, strict=True)]
            for index, reason, is_finite in zip(self._running, reasons, finite, strict=True):
                if reason is None and not is_finite:
                    yield index, self._not_finite(index)
            if not any(stays):
                return
            self._keep(stays)
            chosen = self._choose(logits[torch.tensor(stays, device=logits.device)])
            on_tokens(self._running)
            logits = self._run_tokens(chosen)

    def _stop_reasons(self) -> list[str | None]:
        n_new = self._settings.max_new_tokens
        return [stop_reason(self._responses[index], self._stops_of(index), n_new) for index in self._running]

    def _stops_of(self, index: int) -> frozenset[int]:
        return self._stops[self._prompts[index].chat_template]

    def _keep(self, stays: Sequence[bool]) -> None:
        """Drop the rows of prompts that have ended."""
        if not all(stays):
            rows = torch.tensor(stays)
            self._model.keep(self._state, rows)
            self._interventions = [each.of_rows(rows) for each in self._interventions]
            self._running = [index for index, stay in zip(self._running, stays, strict=True) if stay]

    def _choose(self, logits: LastLogits) -> list[int]:
        """Choose the next token of each running prompt and append it to the response."""
        generators = [self._generators[index] for index in self._running]
        temperature = self._settings.sampling.temperature
        if self._processors and temperature:
            temperature = 1.0  # the processors have divided by it
        chosen = choose_tokens(logits, temperature, generators)
        for index, token in zip(self._running, chosen, strict=True):
            self._responses[index].append(token)
        return chosen

    def _read_prompts(self) -> LastLogits:
        tokens, mask = left_pad([prompt.token_ids for prompt in self._prompts])
        last_logits = []
        with applied(self._model, self._interventions, LAST_POSITION):
            for rows, step in self._model.prompt_steps(tokens, mask, self._state, self._recorder.names):
                self._recorder.record(self._running[rows], step.cache)
                last_logits.append(step.logits)
        return torch.cat([each for each in last_logits if each is not None])

    def _run_tokens(self, chosen: Sequence[int]) -> LastLogits | None:
        """Run the tokens just chosen, the last ones of responses too, whose activations are recorded; the logits
        if any response goes on."""
        goes_on = None in self._stop_reasons()
        if not goes_on and not self._settings.hooks:
            return None
        tokens = torch.tensor(chosen)[:, None]
        step = self._step(tokens, torch.ones_like(tokens), want_logits=goes_on)
        self._recorder.record(self._running, step.cache)
        return step.logits

    def _step(self, tokens: Tokens, mask: Mask, *, want_logits: bool) -> Step:
        with applied(self._model, self._interventions, LAST_POSITION):
            return self._model.step(tokens, mask, self._state, self._recorder.names, want_logits=want_logits)

    def _generation(self, index: int, reason: str) -> Generation:
        return Generation(self._prompts[index], tuple(self._responses[index]), reason, self._recorder.take(index))

    def _not_finite(self, index: int) -> Failure:
        position = len(self._prompts[index].token_ids) + len(self._responses[index])
        reason = f"the model's logits are NaN or inf at token {position}: try --dtype float32"
        return Failure(self._prompts[index], reason, NumericalError)
