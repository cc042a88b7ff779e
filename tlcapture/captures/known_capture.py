"""The facts that decide whether a capture is finished. An index of files keeps them without activations and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any

import orjson

from tlcapture.captures.capture import Capture
from tlcapture.captures.capture_names import CaptureNames
from tlcapture.prompts.conversations import without_system
from tlcapture.storage.experiments.file_index import Facts, as_facts
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import KeptTokens, Positions, kept_of

_LONG = ("prompt_text", "messages", "prompt_fields", "capture_date", "stop_reason")  # not kept
_OWN = ("prompt_id", "sample", "positions", "tokens_from", "dropped", "merged")  # differ between captures of a set


@dataclass(frozen=True)
class KnownCapture(CaptureNames):
    """The facts about a capture that an index of files keeps.

    Attributes:
        metadata: the capture's, without long texts.
        conversation: a digest of the prompt's text and messages.
        n_prompt: tokens of the prompt.
        n_tokens: tokens of prompt and response.
        held: indices of the tokens whose activations are held, or whose projections; `None` means all.
        n_layers: layers of the model, whether kept or not.
        d_model: width of the residual stream.
        kept_layers: layers that are kept.
        kept_points: residual points that are kept.
        tokens: a digest of the ids of all tokens, or of their texts where only projections were kept.
        has_attn_out: whether attention outputs are kept.
        run: a digest that all projections made from the same capture share.
    """

    metadata: Mapping[str, Any]
    conversation: str
    n_prompt: int
    n_tokens: int
    held: Sequence[int] | None
    n_layers: int
    d_model: int
    kept_layers: Sequence[int]
    kept_points: Sequence[str]
    tokens: str
    has_attn_out: bool = False
    run: str = ""

    @classmethod
    def of(cls, capture: Capture) -> KnownCapture:
        """The facts of an open capture."""
        stored = capture.metadata, capture.token_ids, capture.positions, capture.kept
        return cls.of_record(*stored, has_attn_out=capture.prompt.residual.attn_out is not None)

    @classmethod
    def of_record(
        cls,
        metadata: Mapping[str, Any],
        tokens: Sequence[str] | Sequence[int],
        positions: Positions,
        kept: KeptPoints,
        *,
        has_attn_out: bool = False,
        run: str = "",
    ) -> KnownCapture:
        """The facts of a capture from its metadata, as they are stored with projections too."""
        return cls(
            {key: value for key, value in metadata.items() if key not in _LONG},
            conversation(metadata),
            positions.n_prompt,
            positions.n_tokens,
            positions.stated,
            kept.n_layers,
            int(metadata["d_model"]),
            kept.layers,
            kept.points,
            digest(list(tokens)),
            has_attn_out,
            run,
        )

    def facts(self) -> Facts | None:
        """The two parts that an index holds: the facts shared by captures of a set, and the capture's own."""
        shared = {key: value for key, value in self.metadata.items() if key not in _OWN}
        own = {key: value for key, value in self.metadata.items() if key in _OWN}
        layers, points = list(self.kept_layers), list(self.kept_points)
        held = None if self.held is None else list(self.held)
        return as_facts(
            [shared, self.n_layers, self.d_model, layers, points, self.has_attn_out],
            [own, self.conversation, self.n_prompt, self.n_tokens, held, self.tokens, self.run],
        )

    @classmethod
    def from_facts(cls, shared: Any, own: Any) -> KnownCapture:
        """The inverse of `facts`; raises `TypeError` or `ValueError` for anything else."""
        metadata, n_layers, d_model, layers, points, has_attn_out = shared
        own_metadata, texts, n_prompt, n_tokens, held, tokens, run = own
        together, kept = {**metadata, **own_metadata}, (layers, points, tokens)
        return cls(together, texts, n_prompt, n_tokens, held, n_layers, d_model, *kept, has_attn_out, run)

    def is_of(self, capture: Capture) -> bool:
        """Whether it has the tokens of another capture."""
        return self.tokens == digest(capture.tokens if self.run else capture.token_ids)

    @property
    def components(self) -> Sequence[str]:
        """The components that can be projected."""
        return ("residual", "attn_out") if self.has_attn_out else ("residual",)

    @cached_property
    def kept(self) -> KeptPoints:
        """Which layers and residual points are kept."""
        return _kept(self.n_layers, tuple(self.kept_layers), tuple(self.kept_points))

    @cached_property
    def positions(self) -> Positions:
        """The tokens whose activations, or projections, are held."""
        return Positions.of(self.held, self.n_prompt, self.n_tokens)

    def holds(self, tokens: KeptTokens | None) -> bool:
        """Whether all chosen tokens are held; without a choice, all tokens."""
        if tokens is None:
            return self.held is None
        return self.positions.includes(kept_of(tokens, self.n_prompt, self.n_tokens))


@lru_cache(maxsize=64)
def _kept(n_layers: int, layers: tuple[int, ...], points: tuple[str, ...]) -> KeptPoints:
    return KeptPoints.of(n_layers, layers, points)


def conversation(metadata: Mapping[str, Any]) -> str:
    """A digest of a prompt's text and messages, the system message left out, according to metadata."""
    return conversation_of(metadata.get("prompt_text"), metadata.get("messages"))


def conversation_of(text: Any, messages: Any) -> str:
    """A digest of a prompt's text and messages, the system message left out."""
    return digest([text, without_system(messages)])


def digest(value: Any) -> str:
    """A short text that is the same for equal values of JSON."""
    try:
        data = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # text that is not Unicode
        data = json.dumps(value, sort_keys=True).encode()
    return blake2b(data, digest_size=12).hexdigest()
