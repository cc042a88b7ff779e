"""The capture loop as an iterator, for notebooks and programs.

from tlcapture import capture, load_model

model = load_model("smollm2")
for cap in capture(model, ["What is a lighthouse for?"], max_new_tokens=20):
    print(cap.response.text, cap.residual(16).shape)
    cap.logit_lens(), cap.attention(12), cap.project("behavioral/refusal", vector_experiment="my_exp")
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import capture_of
from tlcapture.captures.provenance import no_answer_warning
from tlcapture.commands.capturing.options import ALL_LAYERS, CaptureOptions
from tlcapture.commands.capturing.saving import add_ons_of, save_into
from tlcapture.commands.prompt_files.outputs import AddOns
from tlcapture.errors import InputError
from tlcapture.explore.applied_interventions import NO_INTERVENTIONS, AppliedInterventions
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.explorable_capture import ExplorableCapture
from tlcapture.explore.figures.attention_heads import AttentionHeads, HeadsByRow
from tlcapture.explore.live.given_prompts import as_prompt_set, given_token_ids, prompt_of_ids
from tlcapture.explore.live.live_interventions import (
    Hook,
    given_captures,
    live_interventions,
    of_the_same_tokens,
    prompt_of_capture,
)
from tlcapture.explore.roots import layout_of
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.generation.samples import check_names, check_samples, sampled
from tlcapture.generation.sampling.checkpoint_sampling import (
    AskedSampling,
    asked_sampling,
    sampling_for,
    unfollowed,
    without_effect,
)
from tlcapture.generation.sampling.next_token import Sampling, checked_stop
from tlcapture.models.loading import Model, as_model
from tlcapture.prompts.chat_template import NO_ARGS
from tlcapture.prompts.message_spans import Message
from tlcapture.prompts.prompt_sets import ADHOC, Prompt, PromptSet
from tlcapture.prompts.response_lengths import NEW_TOKENS, THINKING_TOKENS
from tlcapture.prompts.template_args import has_switch
from tlcapture.prompts.template_args import template_args as all_template_args
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize_prompt
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Hook as BeforeReplacing
from tlcapture.storage.remote.roots import check_local
from tlcapture.traits.choice import VectorChoice
from tlcapture.traits.interventions.requested import TraitIntervention
from tlcapture.traits.missing_vectors import is_in_package
from tlcapture.views.hooks import hook
from tlcapture.views.internals import internals_view
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import KeptTokens, kept_of

if TYPE_CHECKING:
    from tlcapture.explore.figures.logit_lens_table import LogitLensTable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class LiveCapture(Capture, ExplorableCapture):
    """A capture that is not stored in an experiment.

    Attributes:
        model: the model that was captured.
        vectors: the experiment whose vectors are used by default, if any.
        more: the requested add-ons, if any.
        applied: the interventions and hooks under which it was made.
    """

    model: Model
    vectors: Layout | None = None
    more: AddOns | None = None
    applied: AppliedInterventions = field(default=NO_INTERVENTIONS, kw_only=True)

    def save(
        self,
        target: Experiment | str | Path,
        *,
        before_replacing: BeforeReplacing = lambda new: None,
        allow_model_change: bool = False,
    ) -> Any:
        """Save into an experiment, with the files that `tlcapture capture` writes, so that the page shows them.

            cap.save("my_exp")      # into an experiment, for the page
            cap.save("capture.pt")  # the raw residual alone

        The files are the raw residual, the projections of the captured tokens if there are vectors, and the add-ons
        that were captured. An experiment that does not exist is made. A prompt of the set `adhoc` gets the id that its
        text has there, or the next number.

        Args:
            target: an `Experiment`, its name or its folder; or a path that ends in `.pt`, where the raw residual
                alone is written.
            before_replacing: for a path, called with the complete new file, before it replaces an earlier one.
            allow_model_change: save even if the experiment has captures of another model.

        Returns:
            The `SavedCapture`, or for a path the record of the written file.

        Raises:
            InputError: the experiment uses another model, or the target is not an experiment, or is `packaged`.
            StorageError: a file cannot be replaced or written.
        """
        if isinstance(target, str | Path) and Path(target).suffix == ".pt":
            check_local(Path(target), "save")
            return Capture.save(self, Path(target), before_replacing=before_replacing)
        layout = layout_of(target)
        if is_in_package(layout):
            raise InputError("'packaged' is what comes with the package: save into an experiment of your own")
        choice = VectorChoice(experiment=self._other_vectors(layout))
        saved = save_into(
            layout,
            self,
            self.model,
            self.more,
            vectors=choice,
            allow_model_change=allow_model_change,
        )
        experiment = target if isinstance(target, Experiment) else Experiment(layout.experiment, layout.root)
        return experiment.captures[saved.capture_set][saved.name]

    def _other_vectors(self, layout: Layout) -> str | None:
        """The experiment whose vectors were named, if it is another one in the same root."""
        own = self.vectors
        if own is None or own == layout or (own.root != layout.root and not is_in_package(own)):
            return None
        return own.experiment

    def _stored_internals(self, layer: int) -> dict[str, Tensor] | None:
        if self.more is None or layer not in self.more.wanted.internals:
            return None
        return internals_view(self.more.cache, layer, self.positions)

    def _stored_heads(self, layer: int) -> AttentionHeads | None:
        more = self.more
        if more is None or not more.wanted.attention or hook("pattern", layer) not in more.cache:
            return None
        return self._heads_in(more.cache, layer, "the capture")

    def _stored_attention(self) -> HeadsByRow | None:
        heads = {layer: found for layer in range(self.n_layers) if (found := self._stored_heads(layer)) is not None}
        return HeadsByRow.of(heads, self.n_layers) if heads else None

    def _stored_lens(self) -> LogitLensTable | None:
        return None if self.more is None or self.more.lens is None else self._lens_table(self.more.lens)

    @property
    def _captured(self) -> Capture:
        return self

    def _vectors(self) -> Layout | None:
        return self.vectors

    def _model(self) -> Model:
        return self.model

    def _applied(self) -> AppliedInterventions:
        return self.applied


def capture(
    model: Any,
    prompts: PromptSet | Iterable[str | int | Prompt | Message | Sequence[Message | int]] | Prompt | Message | str,
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
    attention: bool = False,
    logit_lens: bool = False,
    internals: Iterable[int] | int | str = (),
    capture_attn: bool = False,
    layers: Iterable[int] | int = (),
    points: Iterable[str] | str = (),
    tokens: str | None = None,
    save_dtype: str = "auto",
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    thinking: str | None = None,
    template_args: Mapping[str, Any] = NO_ARGS,
    vectors: Experiment | None = None,
    interventions: Iterable[TraitIntervention] = (),
    hooks: Iterable[Hook] = (),
    variant: str | None = None,
) -> Iterator[LiveCapture]:
    """Generate from prompts and yield a `LiveCapture` for each as soon as its response is complete.

    That is not always the order of the prompts: `sorted(capture(...), key=lambda cap: int(cap.prompt_id))` has texts in
    theirs.

        for cap in capture("smollm2", ["How do tides work?"], max_new_tokens=20):
            print(cap.response.text, cap.residual(12).shape)

    Args:
        model: a model that `load_model` returns, a name that it accepts, or an unprocessed HookedTransformer or
            TransformerBridge.
        prompts: a text, a conversation (a list of messages `{"role": ..., "content": ...}`), several of them, or a
            prompt set; or token ids, a list or a tensor `[n_tokens]` or `[n_prompts, n_tokens]`, which are read as they
            are. They become prompts 1, 2, ... of the set `adhoc`. Or captures, live or saved: their tokens run again,
            as one pass, and nothing is generated.
        max_new_tokens: the maximum length of a response, in tokens; by default 50, or 1,024 where the chat template
            makes the model think.
        temperature: 0 is greedy; by default 0.7, or the checkpoint's own with `sampling="checkpoint"`.
        sampling: `plain`, `checkpoint` to follow the checkpoint's generation config, or a `Sampling` in place of
            temperature, seed and the following arguments.
        top_p, top_k, min_p, repetition_penalty: rules as in Hugging Face's `generate`; none by default.
        stop: texts that end a response, with the token that completes one of them.
        samples: the number of responses to each prompt, which is read once; `sample` numbers the captures.
        seed: with prompt set and prompt id, it determines the sampled tokens.
        batch_size: how many prompts run together; by default as many as fit in free memory.
        attention, logit_lens: whether to capture attention patterns of all layers, and the predictions of every layer,
            rather than computing them later; `save` writes them.
        internals: layers whose every activation is captured; `all` takes every layer, with `attention`
            and `logit_lens`.
        capture_attn: whether to capture `attn_out`, too.
        layers, points: layers and residual points to keep; all by default.
        tokens: tokens of the response to keep: `response`, `last`, `first:N` or `A:B`, a slice as in Python; prompt and
            response by default. `positions` of a capture says which it holds.
        save_dtype: dtype of the captured activations: `float32`, `float16`, `bfloat16` or `auto`.
        system_prompt: for all prompts, instead of their own.
        chat_template: whether to apply the chat template; by default if the tokenizer has one.
        thinking: `on` or `off` where the chat template has a switch for thinking.
        template_args: other values for the chat template.
        vectors: the experiment whose vectors are used for interventions, and by default for projections.
        interventions: `Steer(...)`, `Ablate(...)` and `Cap(...)`, applied in this order at each layer.
        hooks: pairs of a hook's name, or of a function that chooses names, and a TransformerLens hook function, which
            every pass calls before the interventions. They are recorded by name.
        variant: the name of the captures' variant; by default it is made from the interventions, if any.

    Raises:
        InputError: an argument is invalid, or a prompt does not fit the model's context.
        ModelError: the model cannot be used.
        OutOfMemoryError: a prompt does not fit in memory, even alone in its batch.
        NumericalError: a prompt's logits are NaN or inf.
    """
    _check_kinds(max_new_tokens, internals, vectors)
    kept_tokens = None if tokens is None else KeptTokens.parse(tokens)
    rules = {"top_p": top_p, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty}
    asked = _asked(sampling, temperature, seed, stop, rules)
    check_samples(samples)
    runner = as_model(model)
    sources = given_captures(prompts)
    values = all_template_args(runner.tokenizer, thinking, template_args, chat_template=chat_template)
    if sources is None:
        tokenized = _tokenized(runner, prompts, system_prompt, chat_template, values)
    else:
        tokenized = [prompt_of_capture(runner, each) for each in sources]
    chosen = sampling_for(asked, runner)
    for note in filter(None, (unfollowed(chosen, runner), without_effect(chosen, samples))):
        _log.warning(note)
    most_tokens = _most_tokens(max_new_tokens, tokenized, runner.n_ctx)
    kept = KeptPoints.of(runner.n_layers, layers, points)
    layout = None if vectors is None else vectors.layout
    applied = live_interventions(runner, interventions, hooks, layout, tokenized, batch_size)
    wanted = CaptureOptions(
        attention=attention,
        logit_lens=logit_lens,
        internals=internals if isinstance(internals, str) else _as_numbers(internals),
        capture_attn=capture_attn,
        layers=kept.layers,
        points=kept.points,
        tokens=kept_tokens,
    ).outputs(runner.n_layers)
    if sources is None:
        check_names(tokenized[0].prompt_set, [prompt.id for prompt in tokenized], samples)
        tokenized = sampled(tokenized, samples)
    for outcome in generate(
        runner,
        tokenized,
        hooks=wanted.live_hooks(runner),
        max_new_tokens=most_tokens,
        sampling=chosen,
        interventions=applied.changes(),
        own_hooks=applied.hooks,
        batch_size=batch_size,
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
            variant=applied.variant(variant),
            interventions=applied.records,
        )
        if sources is not None:
            made = of_the_same_tokens(made, sources[tokenized.index(outcome.prompt)])
        made = made.only(kept_of(kept_tokens, len(made.prompt.tokens), len(made.tokens)))
        more = add_ons_of(outcome, runner, wanted, save_dtype)
        if made.lacks_answer:
            name, can_be_off = f"{made.prompt_set}/{made.name}", has_switch(runner.tokenizer, values)
            _log.warning(no_answer_warning([name], has_switch=can_be_off))
        yield LiveCapture(
            made.prompt, made.response, made.metadata, runner, layout, more, spans=made.spans, applied=applied
        )


def _check_kinds(max_new_tokens: Any, internals: Any, vectors: Any) -> None:
    """Raise `InputError` for arguments of the wrong kind."""
    if max_new_tokens is not None and not (isinstance(max_new_tokens, SupportsIndex) and index(max_new_tokens) >= 0):
        raise InputError(f"max_new_tokens is {max_new_tokens!r}: expected a whole number, at least 0")
    if isinstance(internals, str) and internals != ALL_LAYERS:
        raise InputError(f"internals {internals!r}: expected layers, or {ALL_LAYERS!r}")
    if vectors is not None and not isinstance(vectors, Experiment):
        raise InputError(f"vectors: expected an Experiment, got {type(vectors).__name__}: Experiment({vectors!r})?")


def _tokenized(
    model: Model,
    prompts: Any,
    system_prompt: str | None,
    chat_template: bool | None,
    template_args: Mapping[str, Any],
) -> list[TokenizedPrompt]:
    """The prompts as the model reads them, given as token ids, texts or conversations."""
    if (given := given_token_ids(prompts)) is not None:
        if system_prompt is not None or chat_template or template_args:
            raise InputError("token ids are read as they are: leave out system_prompt, chat_template and thinking")
        return [prompt_of_ids(model, number, ids) for number, ids in enumerate(given, start=1)]
    prompt_set = as_prompt_set(prompts)
    return [
        tokenize_prompt(
            model.tokenizer,
            prompt,
            prompt_set.name,
            system_prompt=prompt_set.system_prompt_of(prompt) if system_prompt is None else system_prompt,
            chat_template=chat_template,
            template_args=template_args,
        )
        for prompt in prompt_set.prompts
    ]


def _asked(
    sampling: str | Sampling, temperature: float | None, seed: int, stop: Sequence[str] | str, rules: Mapping[str, Any]
) -> AskedSampling:
    if not isinstance(sampling, Sampling):
        return asked_sampling(sampling, temperature, seed, checked_stop(stop), **rules)
    if temperature is not None or seed or stop or any(value is not None for value in rules.values()):
        raise InputError("give sampling as a Sampling or as temperature and other arguments, not both")
    return sampling


def _most_tokens(asked: int | None, prompts: Sequence[TokenizedPrompt], n_ctx: int) -> int:
    """The maximum length of a response: as asked, or by default longer for models that think, within the context."""
    if asked is not None:
        return index(asked)
    if not any(prompt.thinks for prompt in prompts):
        return NEW_TOKENS
    return max(NEW_TOKENS, min(THINKING_TOKENS, n_ctx - max(len(prompt.token_ids) for prompt in prompts)))


def _as_numbers(layers: Iterable[SupportsIndex] | SupportsIndex) -> tuple[int, ...]:
    return (index(layers),) if isinstance(layers, SupportsIndex) else tuple(map(index, layers))
