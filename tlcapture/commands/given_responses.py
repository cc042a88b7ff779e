"""`capture --responses-from`: the stored tokens of other captures, run through this model.

The tokens of each response are run one by one, in the batches in which they would be generated, so that equal models
give equal bits: what differs is due to the models, and not to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.commands.compared_sets import CaptureSet
from tlcapture.errors import InputError, StorageError
from tlcapture.names import PromptId, base_set
from tlcapture.prompts.prompt_sets import Prompt, PromptSet


@dataclass(frozen=True)
class GivenResponses:
    """The captures whose tokens are run."""

    source: CaptureSet

    def __str__(self) -> str:
        return str(self.source)

    def prompt_sets(self, only: Sequence[str] = ()) -> tuple[list[PromptSet], list[tuple[str, str]]]:
        """The prompts of the captures, by set, and the captures that cannot be read, with the reasons.

        `only` restricts them to some sets. Raises `InputError` for a set that is not captured.
        """
        names = self._names
        missing = [name for name in only if name not in {base_set(each) for each in names}]
        if missing:
            raise InputError(f"{self.source}: no captures of {', '.join(missing)}; captured sets: {', '.join(names)}")
        found, refused = [], []
        for name in names:
            if only and base_set(name) not in only:
                continue
            prompts = []
            for prompt_id in self.source.layout.captured(name):
                try:
                    prompts.append(_prompt(self._capture(name, prompt_id)))
                except StorageError as error:
                    refused.append((f"{name}/{prompt_id}", str(error)))
            if prompts:
                found.append(PromptSet(name=base_set(name), prompts=prompts))
        return found, refused

    def capture(self, prompt_set: str, prompt_id: PromptId) -> Capture:
        """The capture of a prompt; raises `StorageError` if it cannot be read."""
        name = next(each for each in self._names if base_set(each) == prompt_set)
        return self._capture(name, prompt_id)

    @property
    def _names(self) -> list[str]:
        """The captured sets: the one named, or all but variants."""
        return [name for name in self.source.names if self.source.name or base_set(name) == name]

    def _capture(self, name: str, prompt_id: PromptId) -> Capture:
        return Capture.open(self.source.layout.residual(name, prompt_id))


def _prompt(capture: Capture) -> Prompt:
    metadata = capture.metadata
    messages = metadata.get("messages")
    content: dict[str, Any] = {"messages": list(messages)} if messages else {"text": metadata.get("prompt_text") or " "}
    more = {**(metadata.get("prompt_fields") or {}), "system_prompt": metadata.get("system_prompt")}
    return Prompt.model_validate({**more, **content, "id": capture.prompt_id})
