"""A trait's examples prepared for a model: with responses generated where they are missing, and tokenised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tlcapture.errors import InputError
from tlcapture.extraction.examples import AUTO, Example, Examples, read_examples
from tlcapture.extraction.methods import Labels
from tlcapture.extraction.readout import Reading, tokenize_example
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.generation.sampling import GREEDY
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.prompts.tokenization import decode, tokenize
from tlcapture.storage.config import read_config
from tlcapture.storage.layout import Datasets, Layout

NEW_TOKENS = 40


@dataclass(frozen=True)
class PreparedExamples:
    """Examples as token ids.

    `labels` (whether positive), `held_out` and `texts` (the response or bare text) have one entry per example.
    """

    examples: Examples
    readings: list[Reading]
    labels: Labels
    held_out: Labels
    texts: list[str]

    @property
    def typical(self) -> Reading:
        """The first example whose position and use of the chat template are those of most examples."""
        kinds = [(reading.position, reading.chat_template) for reading in self.readings]
        return self.readings[kinds.index(Counter(kinds).most_common(1)[0][0])]

    @property
    def position(self) -> str:
        """The position at which most examples are read out."""
        return self.typical.position

    @property
    def digest(self) -> str:
        """A digest of token ids and spans, 16 hex digits; it changes with the examples, template and position."""
        digest = hashlib.blake2b(digest_size=8)
        for reading in self.readings:
            digest.update(repr((reading.token_ids, reading.start, reading.stop)).encode())
        return digest.hexdigest()


def prepare_examples(
    datasets: Datasets,
    layout: Layout,
    trait: Trait,
    model: Model,
    *,
    seed: int = 0,
    position: str = "auto",
    examples: Examples | None = None,
    examples_as: str = AUTO,
) -> PreparedExamples:
    """Read a trait's examples and prepare them; prompts without a response get the model's greedy response.

    Raises `InputError` for invalid examples, and for a prompt to which the model gives no response.
    """
    examples = examples or read_examples(datasets, trait, seed=seed, examples_as=examples_as)
    config = read_config(layout)
    answered = _answered([item.example for item in examples.items], model, layout)
    readings = [
        tokenize_example(
            model.tokenizer,
            example,
            position=position,
            chat_template=config.use_chat_template,
            system_prompt=config.system_prompt,
        )
        for example in answered
    ]
    return PreparedExamples(
        examples,
        readings,
        torch.tensor([item.positive for item in examples.items]),
        torch.tensor([item.held_out for item in examples.items]),
        [example.response or example.text or "" for example in answered],
    )


def _answered(examples: Sequence[Example], model: Model, layout: Layout) -> list[Example]:
    """The examples, with the model's greedy response to each prompt that has no response."""
    config = read_config(layout)
    open_ones = {str(number): item for number, item in enumerate(examples) if item.prompt and item.response is None}
    prompts = [
        tokenize(
            model.tokenizer,
            item.prompt or "",
            prompt_set="examples",
            prompt_id=number,
            system_prompt=config.system_prompt,
            chat_template=config.use_chat_template,
        )
        for number, item in open_ones.items()
    ]
    answered = list(examples)
    for outcome in generate(model, prompts, hooks=[], max_new_tokens=NEW_TOKENS, sampling=GREEDY):
        if isinstance(outcome, Failure):
            raise outcome.error(f"example {outcome.prompt.source_text[:40]!r}: {outcome.reason}")
        number = int(outcome.prompt.id)
        response = decode(model.tokenizer, outcome.response_ids).strip()
        if not response:
            raise InputError(f"example {outcome.prompt.source_text[:40]!r}: the model's response is empty")
        answered[number] = answered[number].model_copy(update={"response": response})
    return answered
