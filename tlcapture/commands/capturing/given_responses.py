"""`capture --responses-from`: the stored tokens of other captures, run through this model.

The tokens of each response are run one by one, in the batches in which they would be generated, so that equal models
give equal bits: differences are due to the models and not to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.comparing.compared_sets import CaptureSet
from tlcapture.commands.prompt_files.replay import as_prompt
from tlcapture.errors import InputError, StorageError
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Outcome
from tlcapture.models.loading import Model
from tlcapture.names import PromptId, base_set, capture_name
from tlcapture.prompts.known_tokens import KnownTokens
from tlcapture.prompts.prompt_sets import Prompt, PromptSet
from tlcapture.prompts.tokenization import TokenizedPrompt, other_tokens
from tlcapture.text import beside


@dataclass(frozen=True)
class GivenResponses:
    """The captures whose tokens are run."""

    source: CaptureSet
    _samples: dict[str, dict[PromptId, list[int | None]]] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return str(self.source)

    def prompt_sets(self, only: Sequence[str] = ()) -> tuple[list[PromptSet], list[tuple[str, str]]]:
        """The prompts of the captures, by set, and the captures that cannot be read, with the reasons.

        `only` restricts them to some sets. Raises `InputError` for a set that is not captured.
        """
        capture_sets = self._capture_sets
        missing = [name for name in only if name not in {base_set(each) for each in capture_sets}]
        if missing:
            others = beside(missing[0], capture_sets, "captured sets")
            raise InputError(f"{self.source}: no captures of {', '.join(missing)}{others}")
        found, refused = [], []
        for capture_set in capture_sets:
            if only and base_set(capture_set) not in only:
                continue
            prompts: dict[PromptId, Prompt] = {}  # samples of a prompt share it
            for name in self.source.layout.captured(capture_set):
                try:
                    prompt = _prompt(self._capture(capture_set, name))
                    prompts.setdefault(prompt.id, prompt)
                except StorageError as error:
                    refused.append((f"{capture_set}/{name}", str(error)))
            if prompts:
                found.append(PromptSet.model_construct(name=base_set(capture_set), prompts=list(prompts.values())))
        return found, refused

    def capture(self, prompt_set: str, prompt_id: PromptId, sample: int | None = None) -> Capture:
        """The capture of a prompt, or of one of its samples; raises `StorageError` if it cannot be read."""
        return self._capture(self._capture_set(prompt_set), capture_name(prompt_id, sample))

    def samples(self, prompt_set: str, prompt_id: PromptId) -> list[int | None]:
        """The numbers of the samples that a prompt has; `None` stands for a single response."""
        return self._samples_of(self._capture_set(prompt_set)).get(prompt_id, [])

    def _samples_of(self, capture_set: str) -> dict[PromptId, list[int | None]]:
        if capture_set not in self._samples:
            found: dict[PromptId, list[int | None]] = {}
            for name in self.source.layout.captured(capture_set):
                with suppress(StorageError):  # reported by `prompt_sets`
                    capture = self._capture(capture_set, name)
                    found.setdefault(capture.prompt_id, []).append(capture.sample)
            self._samples[capture_set] = found
        return self._samples[capture_set]

    def _capture_set(self, prompt_set: str) -> str:
        return next(each for each in self._capture_sets if base_set(each) == prompt_set)

    @cached_property
    def _capture_sets(self) -> list[str]:
        """The captured sets: the named one, or all except variants."""
        return [name for name in self.source.names if self.source.name or base_set(name) == name]

    def _capture(self, capture_set: str, name: PromptId) -> Capture:
        return Capture.open(self.source.layout.residual(capture_set, name))

    def check_tokenizer(self, tokenizer: Any, prompt_set: PromptSet) -> None:
        """Raise `InputError` if the tokens of any capture of a set are those of another tokenizer."""
        pairs = [(each.id, sample) for each in prompt_set.prompts for sample in self.samples(prompt_set.name, each.id)]
        for prompt_id, sample in pairs:
            capture = self.capture(prompt_set.name, prompt_id, sample)
            reason = other_tokens(tokenizer, capture.token_ids, capture.tokens)
            if reason is not None:
                raise InputError(
                    f"--responses-from {self}: the tokens of {capture.capture_set}/{capture.prompt_id}, captured from "
                    f"{capture.metadata['inference_model']!r}, come from another tokenizer than this model's: {reason}"
                )

    def are_tokens_of(self, saved: KnownCapture, prompt_set: str, prompt_id: PromptId, sample: int | None) -> bool:
        """Whether a saved capture has the tokens that the given captures now hold for a prompt or sample."""
        source = self.capture(prompt_set, prompt_id, sample)
        return saved.is_of(source) and saved.metadata.get("tokens_from") == KnownTokens.of(source.metadata, ()).origin


def prompt_of(capture: Capture) -> TokenizedPrompt:
    """The prompt of a capture, with its response as a forced one; an empty response is read with the prompt."""
    response = tuple(capture.response.token_ids)
    known = KnownTokens.of(capture.metadata, capture.spans)
    found = replace(as_prompt(capture, capture.prompt_id), given=None, known=known, sample=capture.sample)
    return replace(found, forced=response) if response else replace(found, given=())


def most_new_tokens(prompts: Sequence[TokenizedPrompt]) -> int:
    """The maximum length of the responses when they were generated, or their greatest length."""
    lengths = [len(prompt.forced or ()) for prompt in prompts]
    recorded = [prompt.known.metadata.get("max_new_tokens") for prompt in prompts if prompt.known is not None]
    return max([*lengths, *(each for each in recorded if isinstance(each, int))], default=0)


def longest_forced(prompts: Sequence[TokenizedPrompt]) -> int:
    """The tokens of the longest forced response."""
    return max((len(prompt.forced or ()) for prompt in prompts), default=0)


def generate_or_force(model: Model, prompts: Sequence[TokenizedPrompt], **how: Any) -> Iterator[Outcome]:
    """Run `generate` on prompts with generated or forced responses, and separately on those with an empty one."""
    for are_empty in (False, True):
        kind = [prompt for prompt in prompts if (prompt.given is not None) == are_empty]
        if kind:
            yield from generate(model, kind, **how)


def _prompt(capture: Capture) -> Prompt:
    metadata = capture.metadata
    return Prompt.model_construct(
        id=capture.prompt_id,
        text=metadata.get("prompt_text") or capture.prompt.text,
        messages=tuple(metadata.get("messages") or ()),
        system_prompt=metadata.get("system_prompt"),
        note=None,
    )
