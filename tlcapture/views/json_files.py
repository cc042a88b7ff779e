"""The content of attention and logit-lens files, checked: a head, and an entry per token.

A file may be large. `page/entries.py` reads single entries, and each is checked when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from tlcapture.errors import InputError, StorageError
from tlcapture.storage.validation import Count, FileContent, Layer, Share, checked, first_problem, not_valid
from tlcapture.text import as_ranges

Measure = Annotated[int, Field(ge=1, le=10_000)]
Pattern = list[list[Share]]  # [head][key]
Head = TypeVar("Head", bound="PerTokenHead")
Entry = TypeVar("Entry", bound="_Entry")


class PerTokenHead(FileContent):
    """The content of a file apart from its entries."""

    what: ClassVar[str] = "attention or logit lens"

    tokens: list[str]
    n_prompt_tokens: Count
    n_layers: Measure
    n_response_tokens: Count | None = None

    @classmethod
    def of(cls: type[Head], value: Any, path: Path) -> Head:
        """The head of a file; raises `StorageError` for another."""
        return checked(cls, value, path, cls.what)

    @model_validator(mode="after")
    def _counts_agree(self) -> PerTokenHead:
        n_response = len(self.tokens) - self.n_prompt_tokens
        if n_response < 0 or self.n_response_tokens not in (None, n_response):
            stated = "" if self.n_response_tokens is None else f" and {self.n_response_tokens} of the response"
            raise ValueError(f"{len(self.tokens)} tokens, but it states {self.n_prompt_tokens} of the prompt{stated}")
        return self


class AttentionHead(PerTokenHead):
    """The head of a file of attention patterns."""

    what = "attention"

    n_heads: Measure


class LensHead(PerTokenHead):
    """The head of a logit-lens file."""

    what = "logit lens"

    top_k: Annotated[int, Field(ge=1)]


class _Entry(FileContent):
    """An entry of one token, with something for every layer."""

    token_idx: Count
    by_layer: list[Any]

    @classmethod
    def of(cls: type[Entry], value: Any, path: Path, head: PerTokenHead) -> Entry:
        """The entry of a file with a head; raises `StorageError` for another."""
        entry = checked(cls, value, path, head.what)
        if len(entry.by_layer) != head.n_layers:
            n_layers = len(entry.by_layer)
            raise not_valid(path, head.what, f"token {entry.token_idx} has {n_layers} layers, not {head.n_layers}")
        if entry.token_idx >= len(head.tokens):
            raise not_valid(path, head.what, f"token {entry.token_idx} of {len(head.tokens)}")
        return entry


class AttentionEntry(_Entry):
    """What one token attends to: `by_layer[layer][head]` has one weight for each token up to it.

    A layer without attention is null.
    """

    by_layer: list[Pattern | None]
    context_size: int | None = None

    @classmethod
    def of(cls, value: Any, path: Path, head: PerTokenHead) -> AttentionEntry:
        """The entry of a file with a head; raises `StorageError` if a layer lacks the weights of a head."""
        entry = super().of(value, path, head)
        if isinstance(head, AttentionHead) and any(
            pattern is not None and len(pattern) != head.n_heads for pattern in entry.by_layer
        ):
            raise not_valid(
                path, head.what, f"token {entry.token_idx} does not have {head.n_heads} heads in every layer"
            )
        return entry

    @model_validator(mode="after")
    def _has_a_weight_for_each_token(self) -> AttentionEntry:
        size = self.token_idx + 1
        if self.context_size not in (None, size):
            raise ValueError(f"context_size {self.context_size} of token {self.token_idx}")
        if any(len(weights) != size for pattern in self.by_layer for weights in pattern or ()):
            raise ValueError(f"token {self.token_idx} does not have {size} weights in every head")
        return self


class Prediction(FileContent):
    """A predicted token and its probability."""

    token: str
    prob: Share


class _OfLayer(FileContent):
    """The actual next token's rank, from 1, and probability in one layer's prediction."""

    actual_rank: Annotated[int, Field(ge=1)]
    actual_prob: Share
    layer: Layer | None = None


class LensLayer(_OfLayer):
    """One layer's prediction, likeliest tokens first."""

    top_k: list[Prediction] = Field(min_length=1)


class LensEntry(_Entry):
    """The predictions of one token that has a next one."""

    actual_next_token: str
    by_layer: list[LensLayer]


def _with_first_checked(predictions: list[Any]) -> list[Any]:
    return [Prediction.model_validate(predictions[0]), *predictions[1:]]


class _OverviewLayer(_OfLayer):
    top_k: Annotated[list[Any], Field(min_length=1), AfterValidator(_with_first_checked)]

    @property
    def first(self) -> Prediction:
        return self.top_k[0]


class LensOverview(_Entry):
    """The predictions of one token for an overview of all: only the likeliest of each layer is checked."""

    actual_next_token: str
    by_layer: list[_OverviewLayer]


_PATTERN = TypeAdapter(Pattern)


def pattern_of_layer(entry: Any, layer: int, path: Path) -> Pattern:
    """One layer's weights of an attention entry, other layers unchecked.

    Raises `InputError` for a layer without attention, and `StorageError` for a missing one.
    """
    try:
        if entry["by_layer"][layer] is None:
            with_attention = [n for n, pattern in enumerate(entry["by_layer"]) if pattern is not None]
            raise InputError(f"layer {layer} has no attention: layers {as_ranges(with_attention)} have")
        return _PATTERN.validate_python(entry["by_layer"][layer], strict=True)
    except ValidationError as error:
        raise StorageError(f"{path}: no weights of layer {layer}: {first_problem(error)}") from None
    except (KeyError, TypeError, IndexError):
        raise StorageError(f"{path}: an entry has no layer {layer}") from None
