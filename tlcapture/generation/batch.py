"""Prompts that run together: forward passes, one token per prompt and pass, until every prompt has an outcome."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture.errors import NumericalError
from tlcapture.generation.interventions.acting import Acting, ActingInterventions
from tlcapture.generation.interventions.intervention import HookFunction, Intervention, acting
from tlcapture.generation.outcomes import Failure, Generation, Outcome
from tlcapture.generation.padding import left_pad
from tlcapture.generation.recording.pattern_spools import Spooling
from tlcapture.generation.recording.recorder import Recorder
from tlcapture.generation.recording.transfers import Download
from tlcapture.generation.samples import by_prompt
from tlcapture.generation.sampling.next_token import (
    GIVEN,
    STOP_TEXT,
    STOP_TOKEN,
    Sampling,
    choose_tokens,
    n_numbers,
    stop_reason,
)
from tlcapture.generation.sampling.noise import GumbelNoise, stream_start
from tlcapture.generation.sampling.processors import LogitProcessors, PromptTokens
from tlcapture.generation.stop_texts import StopTexts
from tlcapture.models.checkpoints.finite_weights import remedy
from tlcapture.models.engines.base import StepResult
from tlcapture.models.loading import Model
from tlcapture.models.streams import upload
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import LastLogits, NextTokens, Tokens

Ended = dict[int, str | None]  # why prompts have ended, by index; `None`: their logits are not finite
Outcomes = deque[tuple[int, Outcome]]


@dataclass(frozen=True)
class Settings:
    """How prompts are run: the activations to record, the length and choice of responses, and interventions.

    `own_hooks` are TransformerLens's hook functions with the names of their points, which every pass calls. `spooling`
    is where long patterns are kept; `None` keeps them in memory.
    """

    hooks: Sequence[str] = ()
    max_new_tokens: int = 50
    sampling: Sampling = Sampling()
    interventions: Sequence[Intervention] = ()
    own_hooks: Sequence[tuple[Any, HookFunction]] = ()
    spooling: Spooling | None = None


class Batch:
    """One run of a batch. `run` and `continue_from` are alternatives, and each batch runs once.

    Both yield each prompt's index and outcome as soon as the prompt has ended, and call `on_tokens` after each choice
    of tokens with the indices of the prompts that got one.

    A step of `run` that runs out of memory raises its error once the outcomes so far have been yielded. Then, if the
    prompts `were_read`, `pause` releases memory, and each call of `resume` goes on with some of those without outcome.
    """

    def __init__(self, model: Model, prompts: Sequence[TokenizedPrompt], settings: Settings):
        self._model = model
        self.prompts = prompts
        self._settings = settings
        self._stops = {
            templated: stop_ids(model.tokenizer, model.generation_config, chat_template=templated)
            for templated in {prompt.chat_template for prompt in prompts}
        }
        stop = settings.sampling.stop
        self._stop_texts = StopTexts(model.tokenizer, stop) if stop else None
        lengths = [len(prompt.read_ids) for prompt in prompts]
        self._recorder = Recorder(settings.hooks, lengths, settings.max_new_tokens, settings.spooling)
        self._responses: list[list[int]] = [[] for _ in prompts]
        self.were_read = False  # whether all prompts have been run and recorded
        self._begin(range(len(prompts)))

    def _begin(self, indices: Sequence[int]) -> None:
        """Let some prompts run, whose responses are equally long, given by their indices in the batch."""
        settings = self._settings
        self._running = list(indices)  # the prompt in each row of the state
        self._n_new = len(self._responses[indices[0]]) if indices else 0  # tokens of every response
        self._acting = self._acting_on(indices)
        self._noise: GumbelNoise | None = None  # made when the vocabulary and the device of the logits are known
        self._processors = LogitProcessors(
            settings.sampling.rules,
            settings.sampling.temperature,
            [self._prompt_tokens(self.prompts[index]) for index in indices],
        )
        self._state: Any = None

    def _acting_on(self, indices: Sequence[int]) -> ActingInterventions:
        """The interventions on some prompts, one per row."""
        prompts = [self.prompts[index] for index in indices]
        responses = [self._responses[index] for index in indices]
        return ActingInterventions(self._settings.interventions, self._model, prompts, responses)

    def _prompt_tokens(self, prompt: TokenizedPrompt) -> PromptTokens:
        return PromptTokens(prompt.token_ids, self._stops[prompt.chat_template], self._settings.max_new_tokens)

    def n_new_tokens(self, index: int) -> int:
        """The tokens that a prompt's response has so far."""
        return len(self._responses[index])

    def run(self, on_tokens: Callable[[Sequence[int]], None]) -> Iterator[tuple[int, Outcome]]:
        """Run the prompts from their first token on."""
        logits = self._read()
        self.were_read = True
        yield from self._respond(logits, on_tokens)

    def pause(self) -> None:
        """Release the memory on the device, apart from activations that were recorded there."""
        self._begin(())

    def resume(
        self, indices: Sequence[int], on_tokens: Callable[[Sequence[int]], None]
    ) -> Iterator[tuple[int, Outcome]]:
        """Go on with some of the prompts after `pause`: their tokens so far are read again, as one pass.

        What has been recorded stays and moves to main memory. Tokens that were not reported yet are chosen again.
        """
        for index in indices:
            self._recorder.rewind(index, len(self.prompts[index].read_ids) + len(self._responses[index]))
        self._recorder.leave_devices()
        reasons = {index: self._stop_reason(index) for index in indices}
        ended: Ended = {index: reason for index, reason in reasons.items() if reason is not None}
        yield from self._outcomes(ended)
        self._begin([index for index in indices if index not in ended])
        if self._running:
            logits = self._read()
            if self._processors:
                for tokens in zip(*(self._responses[index] for index in self._running), strict=True):
                    self._processors.append(upload(tokens, logits.device))
            yield from self._respond(logits, on_tokens)

    def continue_from(self, state: Any, on_tokens: Callable[[Sequence[int]], None]) -> Iterator[tuple[int, Outcome]]:
        """Run from a state of all prompt tokens but the last, which is extended; the settings name no hooks."""
        assert not self._settings.hooks, "the activations of the tokens in a state are gone"
        self._state = state
        tokens = torch.tensor([[prompt.token_ids[-1]] for prompt in self.prompts])
        step = self._step(tokens, self._acting.of_last_prompt_token(), want_logits=True)
        yield from self._respond(step.logits, on_tokens)

    def _respond(
        self, logits: LastLogits | None, on_tokens: Callable[[Sequence[int]], None]
    ) -> Iterator[tuple[int, Outcome]]:
        """Choose and run tokens, which stay on the device: main memory gets a copy while they are being run.

        Outcomes are yielded while the next tokens are being run.
        """
        if not self._settings.max_new_tokens:
            yield from self._outcomes({index: self._stop_reason(index) for index in self._running})
            return
        outcomes: Outcomes = deque()
        try:
            while self._running:
                assert logits is not None
                tokens, copy = self._choose(logits)
                logits = self._run_tokens(tokens)
                yield from _handed_out(outcomes)
                ended = self._read_choice(copy.read(), on_tokens)
                outcomes.extend(self._outcomes(ended))
                logits = self._keep([index not in ended for index in self._running], logits)
        except Exception:
            yield from _handed_out(outcomes)
            raise
        yield from _handed_out(outcomes)

    def _choose(self, logits: LastLogits) -> tuple[NextTokens, Download]:
        """Choose the next token of each running prompt; the copy has -1 where the logits are not finite."""
        sampling = self._settings.sampling
        temperature = sampling.temperature
        if self._processors:
            logits = self._processors(logits)
            temperature = 1.0 if temperature else 0  # the processors have divided by it
        if temperature and self._noise is None:
            starts = [stream_start(sampling.seed, self.prompts[index]) for index in self._running]
            width = n_numbers(logits.shape[-1])
            self._noise = GumbelNoise(starts, width, self._settings.max_new_tokens, logits.device, self._n_new)
        choice = choose_tokens(logits, temperature, None if self._noise is None else self._noise.next())
        tokens = self._forced(choice.tokens)
        self._processors.append(tokens)
        self._n_new += 1
        return tokens, Download(torch.where(choice.is_finite, tokens, -1))

    def _forced(self, chosen: NextTokens) -> NextTokens:
        """The next tokens of forced responses, in place of the chosen ones; a batch is forced as a whole."""
        forced = [self.prompts[index].forced for index in self._running]
        if forced[0] is None:
            return chosen
        return upload([response[self._n_new] for response in forced if response is not None], chosen.device)

    def _read_choice(self, tokens: Sequence[int], on_tokens: Callable[[Sequence[int]], None]) -> Ended:
        """Extend the responses; returns the prompts that have ended, those without a token first."""
        chosen = {index: token for index, token in zip(self._running, tokens, strict=True) if token >= 0}
        for index, token in chosen.items():
            self._responses[index].append(token)
        if chosen:
            on_tokens(list(chosen))
        failed: Ended = {index: None for index in self._running if index not in chosen}
        reasons = {index: self._stop_reason(index) for index in chosen}
        return failed | {index: reason for index, reason in reasons.items() if reason is not None}

    def _stop_reason(self, index: int) -> str | None:
        prompt, response = self.prompts[index], self._responses[index]
        if prompt.given is not None:
            return GIVEN
        if prompt.forced is not None:
            return GIVEN if len(response) >= len(prompt.forced) else None
        reason = stop_reason(response, self._stops[prompt.chat_template], self._settings.max_new_tokens)
        if self._stop_texts is None or reason == STOP_TOKEN or not response:
            return reason
        return STOP_TEXT if self._stop_texts.is_completed(prompt.token_ids[-1], response) else reason

    def _keep(self, stays: Sequence[bool], logits: LastLogits | None) -> Tensor | None:
        """Drop the rows of prompts that have ended; returns the logits of the others."""
        if all(stays):
            return logits
        kept = [row for row, stay in enumerate(stays) if stay]
        self._running = [self._running[row] for row in kept]
        if logits is None or not kept:
            return None
        rows = torch.tensor(stays)
        self._model.keep(self._state, rows)
        self._acting.keep(rows)
        self._processors.keep(kept)
        if self._noise is not None:
            self._noise.keep(kept)
        return logits.index_select(0, upload(kept, logits.device))

    def _read(self) -> LastLogits:
        """Run the tokens so far of the running prompts; prompts that `were_read` before are recorded already.

        Samples of a prompt that have no tokens yet are read once, and then have rows of their own.
        """
        running = self._running
        samples = [[index] for index in running]
        if not self._n_new:
            groups = by_prompt([self.prompts[index] for index in running])
            samples = [[running[row] for row in group] for group in groups]
        sequences = [[*self.prompts[first].read_ids, *self._responses[first]] for first, *_ in samples]
        n_positions = max(map(len, sequences)) - self._n_new + self._settings.max_new_tokens
        self._state = self._model.start(len(samples))
        if len(samples) == len(running):
            self._model.reserve(self._state, n_positions)
            return self._read_sequences(sequences, samples, self._acting)
        logits = self._read_sequences(sequences, samples, self._acting_on([first for first, *_ in samples]))
        copies = [row for row, group in enumerate(samples) for _ in group]
        self._state = self._model.branch(self._state, copies)
        self._model.reserve(self._state, n_positions)
        return logits.index_select(0, upload(copies, logits.device))

    def _read_sequences(
        self, sequences: Sequence[Sequence[int]], samples: Sequence[Sequence[int]], changes: ActingInterventions
    ) -> LastLogits:
        """Run sequences of token ids, one per row of an empty state; `samples` are the prompts that begin with it."""
        # At once: between micro-batches, a copy from main memory would wait for the one before it.
        tokens, mask = (each.to(self._model.device) for each in left_pad(sequences))
        hooks = frozenset[str]() if self.were_read else self._recorder.names
        self._model.prepare(hooks)
        last_logits = []
        with acting(self._model, changes.of_read(), self._settings.own_hooks):
            for part, step in self._model.prompt_steps(tokens, mask, self._state, hooks):
                if not self.were_read:
                    self._record_prompts(samples[part], step.cache)
                last_logits.append(step.logits)
        return torch.cat([each for each in last_logits if each is not None])

    def _record_prompts(self, samples: Sequence[Sequence[int]], cache: dict[str, Tensor]) -> None:
        """Record a step of prompts, one per row, for all of their samples, which are neighbours in the batch."""
        if len(samples) == sum(map(len, samples)):
            self._recorder.record([index for (index,) in samples], cache)
            return
        for row, indices in enumerate(samples):
            own = {name: each[row : row + 1].expand(len(indices), *each.shape[1:]) for name, each in cache.items()}
            self._recorder.record(indices, own)

    def _run_tokens(self, chosen: NextTokens) -> LastLogits | None:
        """Run and record the tokens just chosen, including the last tokens of responses; returns the logits
        if any response may go on."""
        may_go_on = self._n_new < self._settings.max_new_tokens
        if not may_go_on and not self._settings.hooks:
            return None
        step = self._step(chosen[:, None], self._acting.of_token(chosen), want_logits=may_go_on)
        self._recorder.record(self._running, step.cache)
        return step.logits

    def _step(self, tokens: Tokens, interventions: Acting, *, want_logits: bool) -> StepResult:
        mask, names = torch.ones_like(tokens), self._recorder.names
        with acting(self._model, interventions, self._settings.own_hooks):
            return self._model.step(tokens, mask, self._state, names, want_logits=want_logits)

    def _outcomes(self, ended: Ended) -> Iterator[tuple[int, Outcome]]:
        """The outcomes of prompts that have ended, whose activations begin to leave the device."""
        for index, reason in ended.items():
            yield index, self._not_finite(index) if reason is None else self._generation(index, reason)

    def _generation(self, index: int, reason: str) -> Generation:
        prompt = self.prompts[index]
        response_ids = (*(prompt.given or ()), *self._responses[index])
        return Generation(prompt, response_ids, reason, self._recorder.take(index))

    def _not_finite(self, index: int) -> Failure:
        self._recorder.forget(index)
        position = len(self.prompts[index].read_ids) + len(self._responses[index])
        reason = f"the model's logits are NaN or inf at token {position}: {remedy(self._model.dtype, self._model.name)}"
        return Failure(self.prompts[index], reason, NumericalError)


def _handed_out(outcomes: Outcomes) -> Iterator[tuple[int, Outcome]]:
    """Hand out the outcomes without keeping them."""
    while outcomes:
        yield outcomes.popleft()
