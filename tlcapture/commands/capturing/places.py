"""The places of planned captures in the experiment, and the batches that their prompts run in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.errors import InputError
from tlcapture.generation.samples import n_together
from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
from tlcapture.names import PromptId, capture_name
from tlcapture.prompts.prompt_sets import Prompt, PromptSet
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.report import Failed
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """The place of the capture of a prompt, or of one of its samples, in the experiment."""

    prompt_set: PromptSet
    prompt: Prompt
    sample: int | None
    capture_set: str

    @property
    def name(self) -> PromptId:
        """The name of the capture in its set."""
        return capture_name(self.prompt.id, self.sample)

    @property
    def where(self) -> tuple[str, PromptId]:
        """The set of the capture and its name, as methods of a layout take them."""
        return self.capture_set, self.name

    def __str__(self) -> str:
        return f"{self.capture_set}/{self.name}"


class PromptError(InputError):
    """A prompt cannot be captured as asked; other prompts can."""


class NotCapturedError(PromptError):
    """A prompt is to be replayed and has no capture."""


def not_captured(
    layout: Layout, options: CaptureOptions, model: str, places: Sequence[Place], n_places: int
) -> list[Failed]:
    """The failure of all prompts of a set that are to be replayed and have no capture: a name, and the reason.

    The reason names the command that makes the captures, unless it would need the options of a variant.
    """
    if not places:
        return []
    words = [] if (read_config(layout).inference_model or EMBEDDED) == model else ["--model", model]
    for name, value in (("--samples", options.samples), ("--limit", options.limit)):
        words += [] if value is None else [name, str(value)]
    command = command_line(layout, "capture", "--prompt-set", places[0].prompt_set.name, *words, "--skip-existing")
    remedy = f"run '{command}' first" if options.variant is None else "capture them first, as the others of the variant"
    missing = f"{len(places)} of {n_places} {'is' if len(places) == 1 else 'are'} missing"
    return [Failed(places[0].capture_set, f"--replay needs saved captures, and {missing}: {remedy}")]


def chunks(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Pieces of at most `most` items."""
    return [items[start : start + most] for start in range(0, len(items), most)]


def batches(prompts: Sequence[TokenizedPrompt], most: int) -> list[Sequence[TokenizedPrompt]]:
    """Batches of at most `most` prompts, which keep samples of a prompt together if possible."""
    parts: list[Sequence[TokenizedPrompt]] = []
    start = 0
    while start < len(prompts):
        count = n_together(prompts, most, start)
        parts.append(prompts[start : start + count])
        start += count
    return parts
