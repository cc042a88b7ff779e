"""The capture loop as an iterator, for notebooks and programs.

from tlcapture import capture, load_model

model = load_model("smollm2")
for cap in capture(model, ["What is a lighthouse for?"], max_new_tokens=20):
    print(cap.response.text, cap.residual(16).shape)
    cap.logit_lens(), cap.attention(12), cap.project("behavioral/refusal", vector_experiment="my_exp")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import capture_of
from tlcapture.captures.provenance import no_answer_warning
from tlcapture.errors import InputError
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.explorable_capture import ExplorableCapture
from tlcapture.generation.checkpoint_sampling import (
    AskedSampling,
    asked_sampling,
    sampling_for,
    unfollowed,
    without_effect,
)
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.generation.samples import check_names, check_samples, sampled
from tlcapture.generation.sampling import Sampling, checked_stop
from tlcapture.logger import get_logger
from tlcapture.models.loading import Model, as_model
from tlcapture.prompts.chat_template import NO_ARGS
from tlcapture.prompts.message_spans import Message
from tlcapture.prompts.prompt_sets import ADHOC, Prompt, PromptSet
from tlcapture.prompts.template_args import has_switch
from tlcapture.prompts.template_args import template_args as all_template_args
from tlcapture.prompts.thinking import THINKING_TOKENS
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize
from tlcapture.storage.layout import Layout
from tlcapture.storage.validation import first_problem
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import KeptTokens, kept_of
from tlcapture.views.residual import residual_hooks

NEW_TOKENS = 50  # of a response, by default

_log = get_logger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class LiveCapture(Capture, ExplorableCapture):
    """A capture that is not stored in an experiment.

    Attributes:
        model: the model that was captured.
        vectors: the experiment whose vectors are used by default, if any.
    """

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
    prompts: PromptSet | Iterable[str | Prompt | Message | Sequence[Message]] | Prompt | Message | str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    sampling: str | Sampling = "plain",
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] | str = (),
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    capture_attn: bool = False,
    layers: Iterable[int] = (),
    points: Iterable[str] = (),
    tokens: str | None = None,
    save_dtype: str = "auto",
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    thinking: str | None = None,
    template_args: Mapping[str, Any] = NO_ARGS,
    vectors: Experiment | None = None,
) -> Iterator[LiveCapture]:
    """Generate from prompts and yield a `LiveCapture` for each as soon as its response is complete.

    Args:
        model: a model that `load_model` returns, a name that it accepts, or an unprocessed HookedTransformer or
            TransformerBridge.
        prompts: a text, a conversation (a list of messages `{"role": ..., "content": ...}`), several of them, or a
            prompt set. They become prompts 1, 2, ... of the set `adhoc`.
        max_new_tokens: the maximum length of a response, in tokens; by default 50, or 1,024 where the chat template
            makes the model think.
        temperature: 0 is greedy; by default 0.7, or the checkpoint's own with `sampling="checkpoint"`.
        sampling: `plain`, `checkpoint` to follow the checkpoint's generation config, or a `Sampling` in place of
            temperature, seed and the following arguments.
        top_p, top_k, min_p, repetition_penalty: rules as in Hugging Face's `generate`; none by default.
        stop: texts of which one ends a response, with the token that completes it.
        samples: so many responses to each prompt, which is read once; captures then have the number of theirs in
            `sample`.
        seed: with prompt set and prompt id, it determines the sampled tokens.
        batch_size: how many prompts run together; by default as many as fit in free memory.
        capture_attn: whether to capture `attn_out`, too.
        layers, points: layers and residual points to keep; all by default.
        tokens: tokens of the response to keep: `response`, `last`, `first:N` or `A:B`, a slice as in Python; prompt and
            response by default. `positions` of a capture says which it holds.
        save_dtype: dtype of the captured activations: `float32`, `float16`, `bfloat16` or `auto`.
        system_prompt: for prompts that have none of their own.
        chat_template: whether to apply the chat template; by default if the tokenizer has one.
        thinking: `on` or `off` where the chat template has a switch for thinking.
        template_args: other values for the chat template.
        vectors: the experiment whose vectors the captures are projected onto by default.

    Raises:
        InputError: an argument is invalid, or a prompt does not fit the model's context.
        ModelError: the model cannot be used.
        OutOfMemoryError: a prompt does not fit in memory, even alone in its batch.
        NumericalError: a prompt's logits are NaN or inf.
    """
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: expected at least 0")
    if vectors is not None and not isinstance(vectors, Experiment):
        raise InputError(f"vectors: expected an Experiment, got {type(vectors).__name__}: Experiment({vectors!r})?")
    kept_tokens = None if tokens is None else KeptTokens.parse(tokens)
    rules = {"top_p": top_p, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty}
    asked = _asked(sampling, temperature, seed, stop, rules)
    check_samples(samples)
    runner = as_model(model)
    prompt_set = _as_prompt_set(prompts)
    values = all_template_args(runner.tokenizer, thinking, template_args, chat_template=chat_template)
    tokenized = [
        replace(
            tokenize(
                runner.tokenizer,
                prompt.text,
                prompt_set=prompt_set.name,
                prompt_id=prompt.id,
                system_prompt=prompt_set.system_prompt_of(prompt, system_prompt),
                chat_template=chat_template,
                messages=prompt.messages,
                template_args=values,
            ),
            fields=prompt.fields,
        )
        for prompt in prompt_set.prompts
    ]
    chosen = sampling_for(asked, runner)
    for note in filter(None, (unfollowed(chosen, runner), without_effect(chosen, samples))):
        _log.warning(note)
    most_tokens = _most_tokens(max_new_tokens, tokenized, runner.n_ctx)
    kept = KeptPoints.of(runner.n_layers, layers, points)
    hooks = residual_hooks(runner.n_layers, runner.hook_names, attn_out=capture_attn, only=kept)
    check_names(prompt_set.name, [prompt.id for prompt in tokenized], samples)
    tokenized = sampled(tokenized, samples)
    for outcome in generate(
        runner, tokenized, hooks=hooks, max_new_tokens=most_tokens, sampling=chosen, batch_size=batch_size
    ):
        if isinstance(outcome, Failure):
            raise outcome.error(f"prompt {outcome.prompt.prompt_set}/{outcome.prompt.name}: {outcome.reason}")
        made = capture_of(
            outcome,
            runner,
            experiment=ADHOC,
            sampling=chosen,
            max_new_tokens=most_tokens,
            attn_out=capture_attn,
            save_dtype=save_dtype,
            kept=kept,
        )
        made = made.only(kept_of(kept_tokens, len(made.prompt.tokens), len(made.tokens)))
        layout = None if vectors is None else vectors.layout
        if made.lacks_answer:
            name, can_be_off = f"{made.prompt_set}/{made.name}", has_switch(runner.tokenizer, values)
            _log.warning(no_answer_warning([name], has_switch=can_be_off))
        yield LiveCapture(made.prompt, made.response, made.metadata, runner, layout, spans=made.spans)


def _asked(
    sampling: str | Sampling, temperature: float | None, seed: int, stop: Sequence[str] | str, rules: Mapping[str, Any]
) -> AskedSampling:
    if not isinstance(sampling, Sampling):
        return asked_sampling(sampling, temperature, seed, checked_stop(stop), **rules)
    if temperature is not None or seed or stop or any(value is not None for value in rules.values()):
        raise InputError("give sampling as a Sampling or as temperature and other arguments, not both")
    return sampling


def _most_tokens(asked: int | None, prompts: Sequence[TokenizedPrompt], n_ctx: int) -> int:
    """The maximum length of a response: as asked, or by default longer for models that think, as far as it fits."""
    if asked is not None:
        return asked
    if not any(prompt.thinks for prompt in prompts):
        return NEW_TOKENS
    return max(NEW_TOKENS, min(THINKING_TOKENS, n_ctx - max(len(prompt.token_ids) for prompt in prompts)))


def _as_prompt_set(prompts: PromptSet | Iterable[Any] | Prompt | str) -> PromptSet:
    if isinstance(prompts, PromptSet):
        return prompts
    given = [prompts] if isinstance(prompts, str | Mapping | Prompt) else list(prompts)
    if given and all(isinstance(each, Mapping) for each in given):
        given = [given]  # the messages of one conversation
    if not given:
        raise InputError("no prompts: give at least one text")
    try:
        return PromptSet(name=ADHOC, prompts=[_as_prompt(number, each) for number, each in enumerate(given, start=1)])
    except ValidationError as error:
        raise InputError(f"expected texts, lists of messages, Prompts or a PromptSet: {first_problem(error)}") from None


def _as_prompt(number: int, given: Any) -> Any:
    if isinstance(given, str):
        return Prompt(id=str(number), text=given)
    if isinstance(given, list | tuple):
        return Prompt.model_validate({"id": str(number), "messages": given})
    return given
