"""The tasks of a capture: the prompts of each set as token ids, and the outputs that each of them lacks.

All tasks are planned before any is carried out, so that a wrong request writes nothing, and so that the size of the
files can be compared with the free space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain

from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.capturing.decisions import CaptureDecider, Decision
from tlcapture.commands.capturing.given_responses import most_new_tokens, prompt_of
from tlcapture.commands.capturing.interventions import check_same_interventions
from tlcapture.commands.capturing.kept_settings import notes_of_kept, other_weights
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.places import NotCapturedError, Place, PromptError, batches, chunks, not_captured
from tlcapture.commands.capturing.prompt_wording import PromptWording
from tlcapture.commands.prompt_files.known_files import KnownFiles
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.errors import InputError, StorageError
from tlcapture.generation.samples import check_names
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.names import PromptId, of_variant, split_name
from tlcapture.prompts.chat_template import check_renders, uses_chat_template
from tlcapture.prompts.prompt_sets import Prompt, PromptSet
from tlcapture.prompts.response_lengths import THINKING_TOKENS
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.report import Failed
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.file_index import Learn
from tlcapture.storage.experiments.layout import Layout


@dataclass(frozen=True)
class CaptureTask:
    """The work on the prompts of one set.

    Attributes:
        batched: prompts, and samples of prompts, that are put into batches: those in `fresh` and, with
            `--skip-existing`, the ones that would share their batches in an uninterrupted run, so that the results are
            the same to the last bit.
        fresh: names of captures to generate: ids of prompts, or of their samples.
        saved: names of captures that exist, with the outputs that they lack.
        failing: prompts that fail before any work is done, with the reasons.
        notes: warnings about captures that are kept although they were made with other settings.
        max_new_tokens: the maximum length of a response, as far as the model's context allows it by default.
        longest: the number of tokens of the longest prompt of the set.
        variant: the variant whose captures they are, if any.
        norm_prompts: all prompts of the set, where typical norms are measured on them.
    """

    prompt_set: PromptSet
    batched: Sequence[TokenizedPrompt] = ()
    fresh: frozenset[PromptId] = frozenset()
    saved: Mapping[PromptId, Outputs] = field(default_factory=dict)
    failing: Sequence[Failed] = ()
    notes: Sequence[str] = ()
    max_new_tokens: int = 50
    longest: int = 0
    variant: str | None = None
    norm_prompts: Sequence[TokenizedPrompt] = ()

    @property
    def capture_set(self) -> str:
        """The set that the captures are in: the prompt set, or its variant."""
        return of_variant(self.prompt_set.name, self.variant)

    @property
    def fresh_prompts(self) -> Sequence[TokenizedPrompt]:
        """The prompts, and samples of prompts, in `fresh`."""
        return [prompt for prompt in self.batched if prompt.name in self.fresh]

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
        bare = CaptureTask(only_name, max_new_tokens=self.max_new_tokens, longest=self.longest, variant=self.variant)
        parts = [
            replace(bare, batched=batch, fresh=fresh)
            for batch in batches(ordered, most)
            if (fresh := self.fresh & {prompt.name for prompt in batch})
        ]
        return parts + [replace(bare, saved=dict(chunk)) for chunk in chunks(list(self.saved.items()), most)]


@dataclass
class _Decided:
    """The decisions about the prompts of a set.

    Attributes:
        fresh, saved: as in a `CaptureTask`.
        kept: captures that `--skip-existing` keeps, by name.
        refused: prompts that cannot be captured as asked, with the reasons.
        unreadable: prompts with a file that cannot be read and is not to be replaced, with the reasons.
    """

    fresh: set[PromptId] = field(default_factory=set)
    saved: dict[PromptId, Outputs] = field(default_factory=dict)
    kept: dict[PromptId, KnownCapture] = field(default_factory=dict)
    refused: list[Failed] = field(default_factory=list)
    unreadable: list[Failed] = field(default_factory=list)

    def add(self, name: PromptId, decision: Decision) -> None:
        """Take in the decision about a prompt or sample."""
        if decision.lacking is None:
            self.fresh.add(name)
        else:
            self.saved[name] = decision.lacking
        if decision.kept is not None:
            self.kept[name] = decision.kept


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
        self._load = load
        self._model = model
        self._learn = learn
        self._wording = PromptWording(options, read_config(layout), model)
        self._decider = CaptureDecider(layout, options, load, model, self._wording)

    def tasks(self, prompt_sets: Sequence[PromptSet]) -> list[CaptureTask]:
        """A task for each prompt set; raises `InputError` if the request is wrong, whatever the prompts."""
        return [self._task(prompt_set) for prompt_set in prompt_sets]

    def _task(self, prompt_set: PromptSet) -> CaptureTask:
        """The task for a prompt set; prompts that cannot be captured as asked are in its `failing`."""
        options, capture_set = self._options, self._options.capture_set(prompt_set.name)
        limited = prompts = prompt_set.prompts[: options.limit]
        if options.shard is not None:
            prompts = list(options.shard.of(prompts))
        check_names(prompt_set.name, [prompt.id for prompt in prompt_set.prompts], options.samples)
        files = KnownFiles(self._layout, capture_set, len(prompts), self._learn)
        check_same_interventions(files, options)
        samples = self._samples(prompt_set, prompts)
        places = [[Place(prompt_set, each, sample, capture_set) for sample in samples[each.id]] for each in prompts]
        decided = self._decided(list(chain.from_iterable(places)), files)
        fresh, saved, kept = decided.fresh, decided.saved, decided.kept
        batched, not_tokenized = self._batched(prompt_set, places, fresh) if fresh else ([], [])
        failing = [*decided.refused, *not_tokenized]
        if fresh and (reason := other_weights(kept, self._model())) is not None:
            failing.append(Failed(capture_set, reason))
            batched, fresh, saved, kept = [], set(), {}, {}
        return CaptureTask(
            prompt_set,
            batched,
            frozenset(fresh),
            saved,
            failing=[*failing, *decided.unreadable],
            notes=notes_of_kept(self._layout, capture_set, kept, options, self._load, self._model() if fresh else None),
            max_new_tokens=self._most_tokens(batched),
            longest=max((len(prompt.token_ids) for prompt in batched), default=0),
            variant=options.variant,
            norm_prompts=self._norm_prompts(prompt_set, limited) if fresh else (),
        )

    def _decided(self, places: Sequence[Place], files: KnownFiles) -> _Decided:
        """The decisions about the prompts and samples of a set."""
        found = _Decided()
        bare: list[Place] = []
        for place in places:
            try:
                decision = self._decider.decide(place, files.of(place.name))
            except StorageError as error:
                found.unreadable.append(Failed(str(place), str(error)))
            except NotCapturedError:
                bare.append(place)
            except PromptError as error:
                found.refused.append(Failed(str(place), str(error)))
            else:
                found.add(place.name, decision)
        found.refused += not_captured(self._layout, self._options, self._load.name, bare, len(places))
        return found

    def _batched(
        self, prompt_set: PromptSet, prompts: Sequence[Sequence[Place]], fresh: set[PromptId]
    ) -> tuple[list[TokenizedPrompt], list[Failed]]:
        """The samples of prompts that can be tokenized, and the others with reasons, which leave `fresh`.

        Raises `InputError` for what no prompt can be rendered with, which is not the failure of a prompt.
        """
        tokenizer, given = self._model().tokenizer, self._options.responses_from
        if given is not None:
            given.check_tokenizer(tokenizer, prompt_set)
        is_templated = given is None and uses_chat_template(tokenizer, self._wording.chat_template)
        _ = self._wording.template_args  # raises for values that the template cannot take, whatever the prompt
        batched, refused = list[TokenizedPrompt](), list[Failed]()
        for places in filter(None, prompts):
            try:
                batched += self._tokenized(prompt_set, places[0].prompt, [place.sample for place in places])
            except InputError as error:
                reason = str(error).removeprefix(f"prompt {prompt_set.name}/{places[0].prompt.id}: ")
                refused += [Failed(str(place), reason) for place in places if place.name in fresh]
                fresh -= {place.name for place in places}
        if refused and not batched and is_templated:
            check_renders(tokenizer, self._wording.template_args)
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

    def _most_tokens(self, prompts: Sequence[TokenizedPrompt]) -> int:
        """The maximum length of a response to prompts, some of which may begin with thinking."""
        if self._options.responses_from is not None:
            return most_new_tokens(prompts)
        asked, thinks = self._options.max_new_tokens, any(prompt.thinks for prompt in prompts)
        return max(asked, THINKING_TOKENS) if thinks and self._options.longer_where_thinking else asked

    def _tokenized(self, prompt_set: PromptSet, prompt: Prompt, samples: Sequence[int | None]) -> list[TokenizedPrompt]:
        """A prompt once for each of its samples, or the responses that are given to it."""
        given = self._options.responses_from
        if given is not None:
            return [prompt_of(given.capture(prompt_set.name, prompt.id, sample)) for sample in samples]
        tokenized = self._wording.tokenized(prompt_set, prompt)
        return [replace(tokenized, sample=sample) for sample in samples]
