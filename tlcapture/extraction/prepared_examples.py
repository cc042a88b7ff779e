"""A trait's examples prepared for a model: with responses generated where they are missing, and tokenised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tlcapture.errors import InputError, TlcaptureError
from tlcapture.extraction.examples import Example, Examples
from tlcapture.extraction.methods import Labels
from tlcapture.extraction.readout import Reading, generated_reading, tokenize_example
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.generation.sampling.next_token import GREEDY, STOP_TOKEN
from tlcapture.models.loading import Model
from tlcapture.prompts.tokenization import TokenizedPrompt, decode, tokenize, unknown_token
from tlcapture.storage.experiments.config import ExperimentConfig, read_config
from tlcapture.storage.experiments.layout import Layout

NEW_TOKENS = 40


@dataclass(frozen=True, eq=False)
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


def prepare_examples(layout: Layout, model: Model, examples: Examples, position: str = "auto") -> PreparedExamples:
    """Tokenize a trait's examples; prompts without a response get the model's greedy response.

    Raises `InputError` for invalid examples, and for a prompt to which the model gives no response.
    """
    config = read_config(layout)
    generated = _generated([item.example for item in examples.items], model, config, position)
    readings, texts = [], []
    for number, item in enumerate(examples.items):
        if number in generated:
            reading, text = generated[number]
        else:
            reading = _tokenized(item.example, model, config, position)
            text = item.example.response or item.example.text or ""
        readings.append(reading)
        texts.append(text)
    return PreparedExamples(
        examples,
        readings,
        torch.tensor([item.positive for item in examples.items]),
        torch.tensor([item.held_out for item in examples.items]),
        texts,
    )


def _tokenized(example: Example, model: Model, config: ExperimentConfig, position: str) -> Reading:
    with _named(example):
        reading = tokenize_example(
            model.tokenizer,
            example,
            position=position,
            chat_template=config.use_chat_template,
            system_prompt=_system_prompt(example, config),
        )
        unknown = unknown_token(model.tokenizer, reading.token_ids, model.d_vocab)
        if unknown is not None:
            raise InputError(unknown)
    return reading


def _generated(
    examples: Sequence[Example], model: Model, config: ExperimentConfig, position: str
) -> dict[int, tuple[Reading, str]]:
    """Readings and texts of the model's greedy responses to the examples without one, by number."""
    prompts = []
    for number, example in enumerate(examples):
        if example.prompt is not None and example.response is None:
            with _named(example):
                prompts.append(_prompt(example, number, model, config))
    found = {}
    for outcome in generate(model, prompts, hooks=[], max_new_tokens=NEW_TOKENS, sampling=GREEDY):
        number = int(outcome.prompt.id)
        with _named(examples[number]):
            if isinstance(outcome, Failure):
                raise outcome.error(outcome.reason)
            ids = outcome.response_ids[:-1] if outcome.stop_reason == STOP_TOKEN else outcome.response_ids
            text = decode(model.tokenizer, ids).strip()
            if not text:
                raise InputError("the model's response is empty")
            found[number] = (generated_reading(outcome.prompt, ids, position=position), text)
    return found


def _prompt(example: Example, number: int, model: Model, config: ExperimentConfig) -> TokenizedPrompt:
    assert example.prompt is not None
    return tokenize(
        model.tokenizer,
        example.prompt,
        prompt_set="examples",
        prompt_id=str(number),
        system_prompt=_system_prompt(example, config),
        chat_template=config.use_chat_template,
    )


def _system_prompt(example: Example, config: ExperimentConfig) -> str | None:
    """The example's own system prompt, else the experiment's."""
    return config.system_prompt if example.system_prompt is None else example.system_prompt


@contextmanager
def _named(example: Example) -> Iterator[None]:
    """Prefix errors with the start of the example."""
    try:
        yield
    except TlcaptureError as error:
        text = example.text or example.prompt or ""
        raise type(error)(f"example {text[:40]!r}: {error}") from None
