"""How the run of a prompt ends: with a `Generation`, or with a `Failure` and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tlcapture.errors import TlcaptureError
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.cache import Cache


@dataclass(frozen=True, eq=False)
class Generation:
    """A prompt with its response, and their activations as one sequence.

    `response_ids` includes the stop token if `stop_reason` is `"stop_token"`, and the token that completed a stop text
    if it is `"stop_text"`; the other reasons are `"max_new_tokens"`, and `"given"` for a response that was read rather
    than generated.
    `cache` maps the hook names that were asked for to `[n_tokens, ...]` (patterns `[head, n_tokens, n_tokens]`).
    """

    prompt: TokenizedPrompt
    response_ids: tuple[int, ...]
    stop_reason: str
    cache: Cache

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of prompt and response."""
        return self.prompt.token_ids + self.response_ids


@dataclass(frozen=True)
class Failure:
    """A prompt without a response: the reason, and the kind of error that a caller raises for it.

    `error` is `InputError` for a prompt that does not fit the model's context, `OutOfMemoryError` for one that does not
    fit in memory, even as a batch of its own, and `NumericalError` for one whose logits are NaN or inf.
    """

    prompt: TokenizedPrompt
    reason: str
    error: type[TlcaptureError]


Outcome: TypeAlias = Generation | Failure
