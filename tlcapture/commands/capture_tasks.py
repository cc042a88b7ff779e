"""What a capture has to do, before it does any of it: prompts made token ids, and what each of them lacks.

Plans are made of all prompt sets first, so that a wrong request writes nothing, and what will be
written can be told from what is free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from tlcapture.captures.capture import Capture
from tlcapture.commands.capture_outputs import Outputs
from tlcapture.commands.capture_records import CaptureRecord
from tlcapture.commands.projections import without_projection
from tlcapture.errors import InputError, StorageError
from tlcapture.generation.loop import Sampling
from tlcapture.prompts.prompt_sets import Prompt, PromptSet
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize
from tlcapture.runs.shards import Shard
from tlcapture.storage.config import ExperimentConfig
from tlcapture.storage.layout import Layout
from tlcapture.traits.choice import VectorChoice, VectorChooser
from tlcapture.views.kept_points import KeptPoints

ALL_LAYERS = "all"
T = TypeVar("T")


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture and how; `internals` is a tuple of layers, or `"all"`.

    `layers` and `points` are those of the residual stream that are kept; all where none is named. `shard` is
    taken of the prompts that `limit` leaves. `projections_only` writes projections, and no raw residual.
    """

    attention: bool = False
    logit_lens: bool = False
    internals: tuple[int, ...] | str = ()
    capture_attn: bool = False
    layers: tuple[int, ...] = ()
    points: tuple[str, ...] = ()
    project: bool = True
    projections_only: bool = False
    replay: bool = False
    skip_existing: bool = False
    vectors: VectorChoice = VectorChoice(layer="default")
    max_new_tokens: int = 50
    sampling: Sampling = Sampling()
    save_dtype: str = "auto"
    batch_size: int | None = None
    limit: int | None = None
    shard: Shard | None = None
    chat_template: bool | None = None
    system_prompt: str | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """Those that are captured, and projected."""
        return ("residual", "attn_out") if self.capture_attn else ("residual",)

    def outputs(self, n_layers: int) -> Outputs:
        """The files wanted of each prompt, for a model of so many layers."""
        everything = self.internals == ALL_LAYERS
        asked = range(n_layers) if self.internals == ALL_LAYERS else (int(layer) for layer in self.internals)
        layers = tuple(sorted(set(asked)))
        for layer in layers:
            if layer >= n_layers:
                raise InputError(f"--layer-internals {layer}: the model has layers 0 to {n_layers - 1}")
        return Outputs(
            KeptPoints.of(n_layers, self.layers, self.points),
            residual=not self.replay,
            raw=not self.projections_only,
            attn_out=self.capture_attn,
            attention=self.attention or everything,
            logit_lens=self.logit_lens or everything,
            internals=layers,
        )


class HasTokenizer(Protocol):
    """What a plan needs of a model: its layers are counted, its tokenizer is used."""

    @property
    def n_layers(self) -> int: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """What to do with the prompts of one set.

    Attributes:
        company: prompts that are batched together: those of `fresh` and, with `--skip-existing`, their neighbours
            in an undisturbed run, beside which they yield the same to the last bit.
        fresh: ids of prompts to generate from.
        saved: ids of prompts that have a capture, and what they lack.
        refused: prompts that cannot be run, and why.
        otherwise: prompts that are there, with responses of another sampling than is asked for now.
    """

    prompt_set: PromptSet
    company: Sequence[TokenizedPrompt]
    fresh: frozenset[str]
    saved: Mapping[str, Outputs]
    refused: Sequence[tuple[str, str]]
    otherwise: Sequence[str] = ()

    @property
    def does_something(self) -> bool:
        return bool(self.fresh) or any(self.saved.values())

    def label(self) -> str:
        """What it is, for people."""
        ids = [*sorted(self.fresh), *self.saved]
        return f"{self.prompt_set.name}/{ids[0]}" if len(ids) == 1 else f"{len(ids)} prompts of {self.prompt_set.name}"

    def split(self, most: int) -> list[Plan]:
        """The same in plans of at most so many prompts, each of which is a batch of like lengths."""
        ordered = sorted(self.company, key=lambda prompt: len(prompt.token_ids), reverse=True)
        parts = [
            replace(self, company=batch, fresh=fresh, saved={}, refused=())
            for batch in _pieces(ordered, most)
            if (fresh := self.fresh & {prompt.id for prompt in batch})
        ]
        saved = list(self.saved.items())
        return parts + [
            replace(self, company=(), fresh=frozenset(), saved=dict(piece), refused=())
            for piece in _pieces(saved, most)
        ]


def _pieces(items: Sequence[T], most: int) -> list[Sequence[T]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


class Planner:
    """Makes plans for an experiment; `model` is called when one is needed."""

    def __init__(
        self,
        layout: Layout,
        options: CaptureOptions,
        config: ExperimentConfig,
        model_name: str,
        model: Callable[[], HasTokenizer],
    ):
        self._layout = layout
        self._options = options
        self._config = config
        self._model_name = model_name
        self._model = model
        self._otherwise: list[str] = []
        self._chooser = VectorChooser(layout, options.vectors)

    def plans(self, prompt_sets: Sequence[PromptSet]) -> list[Plan]:
        """A plan for each prompt set.

        Raises:
            InputError: the request is wrong, or wrong for every single prompt.
        """
        plans = [self.plan(prompt_set) for prompt_set in prompt_sets]
        refused = [reason for plan in plans for _, reason in plan.refused]
        if refused and not self._options.replay and not any(plan.fresh or plan.saved for plan in plans):
            raise InputError(refused[0])
        return plans

    def plan(self, prompt_set: PromptSet) -> Plan:
        prompts = prompt_set.prompts[: self._options.limit]
        if self._options.shard is not None:
            prompts = list(self._options.shard.of(prompts))
        saved: dict[str, Outputs] = {}
        refused: list[tuple[str, str]] = []
        fresh: set[str] = set()
        self._otherwise = []
        for prompt in prompts:
            name, wanted = f"{prompt_set.name}/{prompt.id}", self._lacking(prompt_set, prompt)
            if isinstance(wanted, str):
                refused.append((name, wanted))
            elif wanted.residual:
                fresh.add(prompt.id)
            else:
                saved[prompt.id] = wanted
        company = []
        for prompt in prompts if fresh else ():
            try:
                company.append(self._tokenized(prompt_set, prompt))
            except InputError as error:
                if prompt.id in fresh:
                    fresh.remove(prompt.id)
                    refused.append((f"{prompt_set.name}/{prompt.id}", str(error)))
        return Plan(prompt_set, company, frozenset(fresh), saved, refused, self._otherwise)

    def _lacking(self, prompt_set: PromptSet, prompt: Prompt) -> Outputs | str:
        """What to make of a prompt, or why nothing can be made of it."""
        options, layout = self._options, self._layout
        raw = layout.residual(prompt_set.name, prompt.id)
        if options.replay and not raw.is_file():
            return f"--replay needs a saved capture, there is none at {raw}"
        if options.projections_only:
            return self._lacking_projections(prompt_set, prompt)
        if not raw.is_file() or not (options.skip_existing or options.replay):
            return options.outputs(self._model().n_layers)
        try:
            saved = Capture.open(raw)
        except StorageError:
            return options.outputs(self._model().n_layers)
        wanted = options.outputs(saved.n_layers)
        if not options.skip_existing:
            return wanted
        if not options.replay and not self._is_whole_and_of(saved, prompt_set, prompt):
            return wanted
        lacking = wanted.missing(layout, prompt_set.name, prompt.id)
        if lacking.logit_lens and not (saved.kept.has_all_outputs or options.replay):
            return wanted  # a logit lens cannot be made from what was kept
        if not lacking.residual and not options.replay:
            self._note_sampling(saved)
        return lacking

    def _lacking_projections(self, prompt_set: PromptSet, prompt: Prompt) -> Outputs | str:
        """The same where only projections are to be kept."""
        options, layout, names = self._options, self._layout, (prompt_set.name, prompt.id)
        raw = layout.residual(*names)
        if not raw.is_file():
            found = CaptureRecord.find(layout, *names) if options.skip_existing else None
            wanted = options.outputs(self._model().n_layers if found is None else found.n_layers)
            is_done = (
                found is not None
                and self._is_whole_and_of(found, prompt_set, prompt)
                and found.kept.includes(wanted.kept)
                and not wanted.lacking(layout, *names)
                and not any(
                    without_projection(layout, found, self._chooser.vectors(found, component))
                    for component in options.components
                )
            )
            if found is not None and is_done:
                self._note_sampling(found)
            return wanted.lacking(layout, *names) if is_done else wanted
        if options.skip_existing:
            try:
                saved = Capture.open(raw)
            except StorageError as error:
                return str(error)
            if self._is_whole_and_of(saved, prompt_set, prompt):
                return replace(options.outputs(saved.n_layers).missing(layout, *names), residual=False)
        return (
            f"--projections-only would leave projections of one run beside the raw capture of another, {raw}: remove "
            "that, or run 'tlcapture project'"
        )

    def _note_sampling(self, saved: Capture | CaptureRecord) -> None:
        """Note a prompt that is kept although it was sampled otherwise; a capture that does not say is believed."""
        asked = {"temperature": self._options.sampling.temperature, "max_new_tokens": self._options.max_new_tokens}
        if self._options.sampling.temperature:
            asked["seed"] = self._options.sampling.seed
        if any(saved.metadata.get(name) not in (None, value) for name, value in asked.items()):
            self._otherwise.append(saved.prompt_id)

    def _is_whole_and_of(self, saved: Capture | CaptureRecord, prompt_set: PromptSet, prompt: Prompt) -> bool:
        """Whether a capture is of this prompt, put in this way to this model, rather than of an earlier wording,
        and the run that wrote it came to the end of the prompt."""
        asked = self.asked_template
        return (
            not self._layout.unfinished(prompt_set.name, prompt.id).exists()
            and saved.metadata.get("prompt_text") == prompt.text
            and saved.metadata.get("system_prompt") == self._system_prompt(prompt_set, prompt)
            and saved.metadata["inference_model"] == self._model_name
            and asked in (None, saved.metadata.get("chat_template"))
        )

    @property
    def asked_template(self) -> bool | None:
        option = self._options.chat_template
        return self._config.use_chat_template if option is None else option

    def _system_prompt(self, prompt_set: PromptSet, prompt: Prompt) -> str | None:
        if self._options.system_prompt is not None:
            return self._options.system_prompt
        return prompt_set.system_prompt_of(prompt, self._config.system_prompt)

    def _tokenized(self, prompt_set: PromptSet, prompt: Prompt) -> TokenizedPrompt:
        return tokenize(
            self._model().tokenizer,
            prompt.text,
            prompt_set=prompt_set.name,
            prompt_id=prompt.id,
            system_prompt=self._system_prompt(prompt_set, prompt),
            chat_template=self.asked_template,
        )
