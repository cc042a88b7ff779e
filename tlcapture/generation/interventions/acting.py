"""The rows and positions of each pass of a batch at which interventions act."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tlcapture.generation.interventions.intervention import ALL_POSITIONS, Intervention, Positions, RowMask
from tlcapture.generation.interventions.thinking_rows import ThinkingRows, thinking_rows, thinking_tokens
from tlcapture.generation.interventions.where import EVERYWHERE
from tlcapture.models.loading import Model
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.shapes import NextTokens, Rows

Acting = list[tuple[Intervention, Positions]]


class ActingInterventions:
    """The interventions on prompts that run together, whose responses are equally long.

    `of_read` is for the pass that reads the prompts with their responses so far, `of_token` for each later pass.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        model: Model,
        prompts: Sequence[TokenizedPrompt],
        responses: Sequence[Sequence[int]],
    ):
        self._interventions = list(interventions)
        self._prompts = prompts
        self._responses = [[*(prompt.given or ()), *ids] for prompt, ids in zip(prompts, responses, strict=True)]
        self._tokenizer, self._device = model.tokenizer, model.device
        self._thinking: ThinkingRows | None = None
        if any(each.where.needs_thinking for each in self._interventions):
            openings, templated = [each.opening for each in prompts], [each.chat_template for each in prompts]
            self._thinking = thinking_rows(self._tokenizer, openings, self._responses, templated)
            self._within = RowMask(torch.zeros(len(prompts), 1, dtype=torch.bool, device=model.device))
        self._n_new = len(self._responses[0]) if self._responses else 0  # tokens of every response

    def of_read(self) -> Acting:
        """The interventions that act in the pass over all tokens so far, left-padded."""
        found: Acting = []
        for each in self._interventions:
            if each.where == EVERYWHERE:
                found.append((each, ALL_POSITIONS))
                continue
            flags = [self._flags(each, *row) for row in zip(self._prompts, self._responses, strict=True)]
            width = max((len(row) - row.index(True) for row in flags if True in row), default=0)
            if width:
                rows = [([False] * width + row)[-width:] for row in flags]
                found.append((each, torch.tensor(rows, device=self._device)))
        return found

    def of_last_prompt_token(self) -> Acting:
        """The interventions that act in a pass over the last token of the prompts."""
        return [(each, ALL_POSITIONS) for each in self._interventions if each.where.acts_at(-1)]

    def of_token(self, tokens: NextTokens) -> Acting:
        """The interventions that act in the pass over the next token of each response."""
        number, self._n_new = self._n_new, self._n_new + 1
        if self._thinking is not None:
            self._within.rows[: len(tokens), 0] = self._thinking.read(tokens)
        found: Acting = []
        for each in self._interventions:
            if each.where.needs_thinking:
                found.append((each, self._within))
            elif each.where.acts_at(number):
                found.append((each, ALL_POSITIONS))
        return found

    def keep(self, rows: Rows) -> None:
        """Keep some rows, a boolean mask `[batch]`."""
        self._interventions = [each.of_rows(rows) for each in self._interventions]
        if self._thinking is not None:
            self._thinking.keep(rows.nonzero()[:, 0].tolist())

    def _flags(self, each: Intervention, prompt: TokenizedPrompt, response: Sequence[int]) -> list[bool]:
        n_prompt = len(prompt.token_ids)
        thinking: list[bool] = []
        if each.where.needs_thinking:
            thinking = thinking_tokens(self._tokenizer, prompt.opening, response, chat_template=prompt.chat_template)
        return each.where.of_tokens(n_prompt, n_prompt + len(response), thinking)
