"""The facts about tokens that are run again: their origin, and which of them are which turn, thinking or answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlcapture.prompts.spans import TokenSpan

# What a capture of given tokens takes over from the capture that they come from.
_OF_THE_TOKENS = (
    "prompt_text",
    "messages",
    "system_prompt",
    "chat_template",
    "template_args",
    "merged",
    "dropped",
    "thinking",
    "bos",
    "temperature",
    "seed",
    "sampling",
    "max_new_tokens",
    "stop_reason",
    "prompt_fields",
)
_ORIGIN = (
    "inference_experiment",
    "prompt_set",
    "inference_model",
    "model_fingerprint",
    "adapter",
    "variant",
    "interventions",
)


@dataclass(frozen=True)
class KnownTokens:
    """The metadata and spans of the capture that tokens come from."""

    metadata: Mapping[str, Any]
    spans: tuple[TokenSpan, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, Any], spans: Sequence[TokenSpan]) -> KnownTokens:
        """The facts to keep, from the metadata and spans of a capture."""
        kept = {name: metadata[name] for name in (*_OF_THE_TOKENS, *_ORIGIN) if name in metadata}
        return cls(kept, tuple(spans))

    @property
    def origin(self) -> dict[str, Any]:
        """Where the tokens come from, as metadata hold it under `tokens_from`."""
        return {name: self.metadata[name] for name in _ORIGIN if name in self.metadata}

    def described(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of a capture of the same tokens, with these facts in place of its own."""
        others = {name: value for name, value in made.items() if name not in _OF_THE_TOKENS}
        kept = {name: self.metadata[name] for name in _OF_THE_TOKENS if name in self.metadata}
        return {**others, **kept, "tokens_from": self.origin}
