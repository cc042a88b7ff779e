"""The tasks of a capture: the prompts of each set as token ids, and the outputs that each of them lacks.

All tasks are planned before any is carried out, so that a wrong request writes nothing, and so that the size of the
files can be compared with the free space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from tlcapture.captures.known_capture import KnownCapture, conversation_of
from tlcapture.commands.capturing.given_responses import most_new_tokens, prompt_of
from tlcapture.commands.capturing.interventions import check_same_interventions
from tlcapture.commands.capturing.kept_settings import other_computation, other_sampling, other_weights
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.places import NotCapturedError, Place, PromptError, batches, chunks, not_captured
from tlcapture.commands.projecting.projections import without_projection
from tlcapture.commands.prompt_files.known_files import KnownFiles, PromptFiles
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.errors import InputError, StorageError
from tlcapture.generation.samples import check_names
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.names import PromptId, of_variant, split_name
from tlcapture.prompts.chat_template import NO_ARGS, check_renders, uses_chat_template
from tlcapture.prompts.prompt_sets import Prompt, PromptSet
from tlcapture.prompts.response_lengths import THINKING_TOKENS
from tlcapture.prompts.template_args import template_args
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize_prompt
from tlcapture.runs.existing_files import OVERWRITE, REPLACE, check_replaceable
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.file_index import Learn
from tlcapture.storage.experiments.layout import Layout, derived_files
from tlcapture.traits.choice import VectorChooser
from tlcapture.traits.interventions.records import identity
from tlcapture.traits.projections.saved import merged_files


@dataclass(frozen=True)
class CaptureTask:
    """The work on the prompts of one set.

    Attributes:
        batched: prompts, and samples of prompts, that are put into batches: those in `fresh` and, with
            `--skip-existing`, the ones that would share their batches in an uninterrupted run, so that the results are
            the same to the last bit.
        fresh: names of captures to generate: ids of prompts, or of their samples.
        saved: names of captures that exist, with the outputs that they lack.
        refused: names of prompts that cannot be captured as asked, with the reasons.
        unreadable: names of prompts with a raw file that cannot be read and is not to be replaced, with the reasons.
        max_new_tokens: the maximum length of a response, as far as the model's context allows it by default.
        longest: the number of tokens of the longest prompt of the set.
        variant: the variant whose captures they are, if any.
        norm_prompts: all prompts of the set, where typical norms are measured on them.
        other_sampling: names of captures that are kept although they were made with other sampling settings.
        other_computation: names of those that are kept beside new ones of another dtype or engine.
    """

    prompt_set: PromptSet
    batched: Sequence[TokenizedPrompt]
    fresh: frozenset[PromptId]
    saved: Mapping[PromptId, Outputs]
    refused: Sequence[tuple[str, str]]
    unreadable: Sequence[tuple[str, str]] = ()
    other_sampling: Sequence[PromptId] = ()
    other_computation: Sequence[PromptId] = ()
    max_new_tokens: int = 50
    longest: int = 0
    variant: str | None = None
    norm_prompts: Sequence[TokenizedPrompt] = ()

    @property
    def capture_set(self) -> str:
        """The set that the captures are in: the prompt set, or its variant."""
        return of_variant(self.prompt_set.name, self.variant)

    @property
    def failing(self) -> Sequence[tuple[str, str]]:
        """Names of all prompts that fail before any work is done, with the reasons."""
        return [*self.refused, *self.unreadable]

    @property
    def has_work(self) -> bool:
        """Whether any output has to be made, apart from projections."""
        return bool(self.fresh) or any(self.saved.values())

    def __str__(self) -> str:
        ids = [*sorted(self.fresh, key=str), *self.saved]
        return f"{self.capture_set}/{ids[0]}" if len(ids) == 1 else f"{len(ids)} prompts of {self.capture_set}"

    def split(self, most: int) -> list[CaptureTask]:
        """Split into tasks of at most `most` prompts, each a batch of prompts of similar length.

        They hold none of the set's other prompts, not even the prompts on which norms are measured.
        """
        ordered = sorted(self.batched, key=lambda prompt: len(prompt.token_ids), reverse=True)
        only_name = PromptSet.model_construct(name=self.prompt_set.name, prompts=[])
        same = {name: getattr(self, name) for name in ("max_new_tokens", "longest", "variant")}
        bare = CaptureTask(only_name, (), frozenset(), {}, (), **same)
        parts = [
            replace(bare, batched=batch, fresh=fresh)
            for batch in batches(ordered, most)
            if (fresh := self.fresh & {prompt.name for prompt in batch})
        ]
        return parts + [replace(bare, saved=dict(chunk)) for chunk in chunks(list(self.saved.items()), most)]


class TaskPlanner:
    """Plans the tasks of a capture; `model` is called only when a tokenizer or the number of layers is needed.

    `load` names the model, and has its outline.
    """

    def __init__(
        self,
        layout: Layout,
        options: CaptureOptions,
        load: ModelLoader,
        model: Callable[[], Model | ModelOutline],
        learn: Learn = lambda path, learned: None,
    ):
        self._layout = layout
        self._options = options
        self._config = read_config(layout)
        self._load = load
        self._model = model
        self._learn = learn
        self._kept: dict[PromptId, KnownCapture] = {}
        self._chooser = VectorChooser(layout, options.vectors)

    def tasks(self, prompt_sets: Sequence[PromptSet]) -> list[CaptureTask]:
        """A task for each prompt set; raises `InputError` if the request is wrong, whatever the prompts."""
        return [self.task(prompt_set) for prompt_set in prompt_sets]

    def task(self, prompt_set: PromptSet) -> CaptureTask:
        """The task for a prompt set; prompts that cannot be captured as asked are in its `refused`."""
        capture_set = self._options.capture_set(prompt_set.name)
        limited = prompts = prompt_set.prompts[: self._options.limit]
        if self._options.shard is not None:
            prompts = list(self._options.shard.of(prompts))
        check_names(prompt_set.name, [prompt.id for prompt in prompt_set.prompts], self._options.samples)
        files = KnownFiles(self._layout, capture_set, len(prompts), self._learn)
        check_same_interventions(files, self._options)
        saved: dict[PromptId, Outputs] = {}
        refused: list[tuple[str, str]] = []
        bare: list[Place] = []
        unreadable: list[tuple[str, str]] = []
        fresh: set[PromptId] = set()
        self._kept = {}
        samples = self._samples(prompt_set, prompts)
        places = [[Place(prompt_set, each, sample, capture_set) for sample in samples[each.id]] for each in prompts]
        for place in chain.from_iterable(places):
            try:
                wanted = self._wanted(place, files.of(place.name))
            except StorageError as error:
                unreadable.append((str(place), str(error)))
            except NotCapturedError:
                bare.append(place)
            except PromptError as error:
                refused.append((str(place), str(error)))
            else:
                if wanted.residual:
                    fresh.add(place.name)
                else:
                    saved[place.name] = wanted
        refused += not_captured(self._layout, self._options, self._load.name, bare, sum(map(len, places)))
        batched, not_tokenized = self._batched(prompt_set, places, fresh) if fresh else ([], [])
        refused += not_tokenized
        if fresh and (reason := other_weights(self._kept, self._model())) is not None:
            refused.append((capture_set, reason))
            batched, fresh, saved, self._kept = [], set(), {}, {}
        return CaptureTask(
            prompt_set,
            batched,
            frozenset(fresh),
            saved,
            refused=refused,
            unreadable=unreadable,
            other_sampling=other_sampling(self._kept, self._options),
            other_computation=other_computation(self._kept, self._load, self._model()) if fresh else (),
            max_new_tokens=self._most_tokens(batched),
            longest=max((len(prompt.token_ids) for prompt in batched), default=0),
            variant=self._options.variant,
            norm_prompts=self._norm_prompts(prompt_set, limited) if fresh else (),
        )

    def _batched(
        self, prompt_set: PromptSet, prompts: Sequence[Sequence[Place]], fresh: set[PromptId]
    ) -> tuple[list[TokenizedPrompt], list[tuple[str, str]]]:
        """The samples of prompts that can be tokenized, and the others with reasons, which leave `fresh`.

        Raises `InputError` for what no prompt can be rendered with, which is not the failure of a prompt.
        """
        tokenizer, given = self._model().tokenizer, self._options.responses_from
        if given is not None:
            given.check_tokenizer(tokenizer, prompt_set)
        is_templated = given is None and uses_chat_template(tokenizer, self.asked_template)
        _ = self._all_template_args  # raises for values that the template cannot take, whatever the prompt
        batched, refused = list[TokenizedPrompt](), list[tuple[str, str]]()
        for places in filter(None, prompts):
            try:
                batched += self._tokenized(prompt_set, places[0].prompt, [place.sample for place in places])
            except InputError as error:
                reason = str(error).removeprefix(f"prompt {prompt_set.name}/{places[0].prompt.id}: ")
                refused += [(str(place), reason) for place in places if place.name in fresh]
                fresh -= {place.name for place in places}
        if refused and not batched and is_templated:
            check_renders(tokenizer, self._all_template_args)
        return batched, refused

    def _norm_prompts(self, prompt_set: PromptSet, prompts: Sequence[Prompt]) -> Sequence[TokenizedPrompt]:
        """The prompts on which typical norms are measured: all that are captured, by this shard or others."""
        tokenized: list[TokenizedPrompt] = []
        for prompt in prompts if any(each.lacks_norms for each in self._options.resolved) else ():
            with suppress(InputError):  # reported by the shard that captures it
                tokenized += self._tokenized(prompt_set, prompt, [None])
        return tokenized

    def _samples(self, prompt_set: PromptSet, prompts: Sequence[Prompt]) -> Mapping[PromptId, Sequence[int | None]]:
        """The sample numbers of each prompt to work on; `None` stands for a single, unnumbered response.

        A replay without a number of samples takes all that are saved, and so do the responses of other captures.
        """
        asked, given = self._options.samples, self._options.responses_from
        if given is not None:
            return {prompt.id: given.samples(prompt_set.name, prompt.id) for prompt in prompts}
        if asked is not None or not self._options.replay:
            numbers: Sequence[int | None] = [None] if asked is None else range(1, asked + 1)
            return {prompt.id: numbers for prompt in prompts}
        ids = {str(prompt.id) for prompt in prompt_set.prompts}
        by_prompt: dict[str, list[int | None]] = {}
        for name in self._layout.captured(self._options.capture_set(prompt_set.name)):
            prompt_id, sample = (name, None) if name in ids else split_name(name)
            by_prompt.setdefault(prompt_id, []).append(sample)
        return {prompt.id: by_prompt.get(str(prompt.id), [None]) for prompt in prompts}

    def _wanted(self, place: Place, files: PromptFiles) -> Outputs:
        """The outputs to make: all, or those that a saved capture lacks; raises `StorageError` or `PromptError`."""
        options = self._options
        advice = "capture it again with --overwrite" if options.replay else REPLACE
        existing = files.capture(overwrite=options.overwrite, advice=advice)
        if existing is not None and existing.sample != place.sample:
            raise StorageError(
                f"{files.raw}: the capture of another prompt, {existing.prompt_id}: rename one of the prompts"
            )
        wanted = self._lacking(place, files, existing)
        self._check_replaceable(place, files, wanted, existing)
        return wanted

    def _most_tokens(self, prompts: Sequence[TokenizedPrompt]) -> int:
        """The maximum length of a response to prompts, some of which may begin with thinking."""
        if self._options.responses_from is not None:
            return most_new_tokens(prompts)
        asked, thinks = self._options.max_new_tokens, any(prompt.thinks for prompt in prompts)
        return max(asked, THINKING_TOKENS) if thinks and self._options.longer_where_thinking else asked

    def _check_replaceable(self, place: Place, files: PromptFiles, wanted: Outputs, saved: KnownCapture | None) -> None:
        """Raise `StorageError` if a file cannot be read that would be replaced, removed, or passed over as present."""
        if wanted.residual:
            paths = [*derived_files(self._layout, *place.where), *merged_files(self._layout, place.capture_set)]
        else:  # projections of a capture that was not saved have all been read
            asked = files.add_ons() if saved is None else self._options.outputs(saved.n_layers).existing_add_ons(files)
            paths = [each.path for each in asked if each.view is None]
        advice = f"leave out --replay and {OVERWRITE}" if self._options.replay else OVERWRITE
        for path in paths:
            check_replaceable(self._layout, path, overwrite=self._options.overwrite, advice=advice)

    def _lacking(self, place: Place, files: PromptFiles, saved: KnownCapture | None) -> Outputs:
        """The outputs that a prompt lacks, given its saved capture; raises `PromptError` where it cannot have them."""
        options = self._options
        if options.replay and saved is None:
            raise NotCapturedError
        if options.projections_only:
            return self._lacking_projections(place, files, saved)
        if saved is None or not (options.skip_existing or options.replay):
            return options.outputs(self._n_layers())
        wanted = options.outputs(saved.n_layers)
        if not options.skip_existing or not (options.replay or self._is_whole_and_of(saved, place, files)):
            return wanted
        lacking = wanted.missing(files, saved, self._d_vocab, overwrite=options.overwrite)
        if lacking.logit_lens and not (saved.kept.has_outputs(lacking.parts.lens_layers) or options.replay):
            return wanted  # the logit lens needs layers that were not kept
        if not lacking.residual and not options.replay:
            self._kept[place.name] = saved
        return lacking

    def _lacking_projections(self, place: Place, files: PromptFiles, saved: KnownCapture | None) -> Outputs:
        """The outputs that a prompt lacks where only projections are kept; raises like `_lacking`."""
        options = self._options
        if saved is None:
            is_free = not files.captured_ns  # a file that cannot be read is replaced, with all files derived from it
            projected = files.made_from() if options.skip_existing and is_free else None
            wanted = options.outputs(self._n_layers() if projected is None else projected.n_layers)
            is_done = (
                projected is not None
                and self._is_whole_and_of(projected, place, files)
                and projected.kept.includes(wanted.kept)
                and projected.holds(wanted.tokens)
                and not wanted.lacking(files, self._d_vocab, overwrite=options.overwrite)
                and not any(
                    without_projection(files, self._chooser.vectors(projected, component), options.existing)
                    for component in options.components
                )
            )
            if projected is not None and is_done:
                self._kept[place.name] = projected
            return wanted.lacking(files, self._d_vocab) if is_done else wanted
        if options.skip_existing and self._is_whole_and_of(saved, place, files):
            wanted = options.outputs(saved.n_layers)
            lacking = wanted.missing(files, saved, self._d_vocab, overwrite=options.overwrite)
            return replace(lacking, residual=False)
        project = command_line(self._layout, "project", "--prompt-set", place.capture_set)
        raise PromptError(
            f"--projections-only would leave projections of one run next to the raw capture of another, {files.raw}: "
            f"remove it, or run '{project}'"
        )

    def _is_whole_and_of(self, saved: KnownCapture, place: Place, files: PromptFiles) -> bool:
        """Whether a capture is complete and of this prompt: the same text, system prompt, template and model."""
        asked, given, prompt = self.asked_template, self._options.responses_from, place.prompt
        is_of_this_model = (
            not files.is_unfinished
            and identity(saved.metadata.get("interventions")) == identity(self._options.intervention_records)
            and saved.metadata["inference_model"] == self._load.name
            and saved.metadata.get("adapter") == self._options.adapter
        )
        if not is_of_this_model or given is not None:
            source = (place.prompt_set.name, prompt.id, place.sample)
            return is_of_this_model and given is not None and given.are_tokens_of(saved, *source)
        return (
            "tokens_from" not in saved.metadata
            and saved.conversation == conversation_of(prompt.text, prompt.messages)
            and saved.metadata.get("template_args", {}) == self._all_template_args
            and saved.metadata.get("system_prompt") == self._system_prompt(place.prompt_set, prompt)
            and asked in (None, saved.metadata.get("chat_template"))
        )

    @property
    def asked_template(self) -> bool | None:
        """Whether the chat template is used, by option or config; `None` where neither decides it."""
        option = self._options.chat_template
        return self._config.use_chat_template if option is None else option

    def _system_prompt(self, prompt_set: PromptSet, prompt: Prompt) -> str | None:
        if self._options.system_prompt is not None:
            return self._options.system_prompt
        return prompt_set.system_prompt_of(prompt, self._config.system_prompt)

    def _tokenized(self, prompt_set: PromptSet, prompt: Prompt, samples: Sequence[int | None]) -> list[TokenizedPrompt]:
        """A prompt once for each of its samples, or the responses that are given to it."""
        given = self._options.responses_from
        if given is not None:
            return [prompt_of(given.capture(prompt_set.name, prompt.id, sample)) for sample in samples]
        tokenized = tokenize_prompt(
            self._model().tokenizer,
            prompt,
            prompt_set.name,
            system_prompt=self._system_prompt(prompt_set, prompt),
            chat_template=self.asked_template,
            template_args=self._all_template_args,
        )
        return [replace(tokenized, sample=sample) for sample in samples]

    def _n_layers(self) -> int:
        """The model's layers; from its config where some are named, which are checked before the weights are loaded."""
        return self._load.outline.n_layers if self._options.names_layers else self._model().n_layers

    def _d_vocab(self) -> int:
        return self._load.outline.measures.d_vocab

    @cached_property
    def _all_template_args(self) -> Mapping[str, Any]:
        options = self._options
        if options.thinking is None and not options.template_args:
            return NO_ARGS
        return template_args(
            self._model().tokenizer, options.thinking, options.template_args, chat_template=self.asked_template
        )
