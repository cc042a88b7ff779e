"""The capture loop as an iterator, for notebooks and programs of one's own.

from tlcapture import capture, load_model

model = load_model("smollm2")
for cap in capture(model, ["What is a lighthouse for?"], max_new_tokens=20):
    print(cap.response.text, cap.residual(16).shape)
    cap.logit_lens(), cap.attention(12), cap.project("behavioral/refusal", vector_experiment="my_exp")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import capture_of
from tlcapture.errors import InputError, TlcaptureError
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.explored import Explored
from tlcapture.generation.loop import Failure, Sampling, generate
from tlcapture.models.loading import Model, as_model
from tlcapture.prompts.prompt_sets import ADHOC, Prompt, PromptSet
from tlcapture.prompts.tokenization import tokenize
from tlcapture.storage.layout import Layout
from tlcapture.storage.validation import first_problem
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.residual import residual_hooks


@dataclass(frozen=True, eq=False, repr=False)
class LiveCapture(Capture, Explored):
    """A capture that was just made, with its model, and the experiment whose vectors it is projected onto
    where another is not named."""

    model: Model
    vectors: Layout | None = None

    @property
    def _captured(self) -> Capture:
        return self

    def _vectors(self) -> Layout | None:
        return self.vectors

    def _model(self) -> Model:
        return self.model


def capture(
    model: Any,
    prompts: PromptSet | Iterable[str | Prompt] | str,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.7,
    seed: int = 0,
    batch_size: int | None = None,
    capture_attn: bool = False,
    layers: Iterable[int] = (),
    points: Iterable[str] = (),
    save_dtype: str = "auto",
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    vectors: Experiment | None = None,
) -> Iterator[LiveCapture]:
    """Generate from prompts and yield a `LiveCapture` for each, as soon as its row has stopped.

    Args:
        model: what `load_model` returns, a name it takes, or an unprocessed HookedTransformer or
            TransformerBridge.
        prompts: a text, texts, prompts, or a prompt set. Texts are prompts 1, 2, ... of the set `adhoc`.
        temperature: 0 is greedy.
        batch_size: how many run together; `None` takes what fits in free memory.
        layers, points: those of the residual stream to keep; all where none is named.
        vectors: the experiment onto whose vectors the captures are projected, unless a call names another.

    Raises:
        InputError: a prompt does not fit the model's context.
        TlcaptureError: a prompt yielded nothing, for example NaN logits.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: expected at least 0")
    if vectors is not None and not isinstance(vectors, Experiment):
        raise InputError(f"vectors: expected an Experiment, got {type(vectors).__name__}: Experiment({vectors!r})?")
    runner = as_model(model)
    prompt_set = _as_prompt_set(prompts)
    tokenized = [
        tokenize(
            runner.tokenizer,
            prompt.text,
            prompt_set=prompt_set.name,
            prompt_id=prompt.id,
            system_prompt=prompt_set.system_prompt_of(prompt, system_prompt),
            chat_template=chat_template,
        )
        for prompt in prompt_set.prompts
    ]
    sampling = Sampling(temperature, seed)
    kept = KeptPoints.of(runner.n_layers, layers, points)
    hooks = residual_hooks(runner.n_layers, runner.hook_names, attn_out=capture_attn, only=kept)
    for outcome in generate(
        runner, tokenized, hooks=hooks, max_new_tokens=max_new_tokens, sampling=sampling, batch_size=batch_size
    ):
        if isinstance(outcome, Failure):
            kind = InputError if "does not fit" in outcome.reason else TlcaptureError
            raise kind(f"prompt {outcome.prompt.prompt_set}/{outcome.prompt.id}: {outcome.reason}")
        made = capture_of(
            outcome,
            runner,
            experiment=ADHOC,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            attn_out=capture_attn,
            save_dtype=save_dtype,
            kept=kept,
        )
        layout = None if vectors is None else vectors.layout
        yield LiveCapture(made.prompt, made.response, made.metadata, runner, layout)


def _as_prompt_set(prompts: PromptSet | Iterable[str | Prompt] | str) -> PromptSet:
    if isinstance(prompts, PromptSet):
        return prompts
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise InputError("no prompts: give at least one text")
    try:
        made = [
            Prompt(id=str(number), text=prompt) if isinstance(prompt, str) else prompt
            for number, prompt in enumerate(given, start=1)
        ]
        return PromptSet(name=ADHOC, prompts=made)
    except ValidationError as error:
        raise InputError(f"prompts are texts, Prompts or a PromptSet: {first_problem(error)}") from None
