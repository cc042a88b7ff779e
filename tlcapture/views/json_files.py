"""The content of attention and logit-lens files, checked: a head, and an entry per token.

A file may be large. `page/entries.py` reads single entries, and each is checked when it is read.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from tlcapture.errors import InputError, StorageError
from tlcapture.storage.files import read_json
from tlcapture.storage.validation import Count, FileContent, Layer, Share, checked, first_problem, not_valid
from tlcapture.text import as_ranges
from tlcapture.views.kept_tokens import Positions, stated_positions

Measure = Annotated[int, Field(ge=1, le=10_000)]
Pattern = list[list[Share]]  # [head][key]
_FIRST_ENTRY = re.compile(rb'\{\s*"token_idx"')
_TAIL = 256
Head = TypeVar("Head", bound="PerTokenHead")
Entry = TypeVar("Entry", bound="_Entry")


class PerTokenHead(FileContent):
    """The content of a file apart from its entries, which it has for the tokens in `positions`, by default for all."""

    what: ClassVar[str] = "attention or logit lens"
    entries: ClassVar[str] = ""

    tokens: list[str]
    n_prompt_tokens: Count
    n_layers: Measure
    n_response_tokens: Count | None = None
    positions: list[Count] | None = None

    @property
    def positions_held(self) -> Positions:
        """The tokens that the file is of."""
        return stated_positions(self, self.n_prompt_tokens, len(self.tokens))

    @classmethod
    def of(cls: type[Head], value: Any, path: Path) -> Head:
        """The head of a file; raises `StorageError` for another."""
        return checked(cls, value, path, cls.what)

    @classmethod
    def read(cls: type[Head], path: Path) -> Head:
        """The head of a file; raises `StorageError` for another, and for one that is cut off."""
        value = _without_entries(path)
        return cls.of(read_json(path) if value is None else value, path)

    @classmethod
    def check_file(cls, path: Path) -> None:
        """Raise `StorageError` for a file that is cut off or of another kind; of its entries, only the end is read."""
        head = cls.read(path)
        if not isinstance((head.model_extra or {}).get(cls.entries), list):
            raise not_valid(path, cls.what, f"{cls.entries}: expected a list")

    @model_validator(mode="after")
    def _counts_agree(self) -> PerTokenHead:
        n_response = len(self.tokens) - self.n_prompt_tokens
        if n_response < 0 or self.n_response_tokens not in (None, n_response):
            stated = "" if self.n_response_tokens is None else f" and {self.n_response_tokens} of the response"
            raise ValueError(f"{len(self.tokens)} tokens, but it states {self.n_prompt_tokens} of the prompt{stated}")
        _ = self.positions_held
        return self


class AttentionHead(PerTokenHead):
    """The head of a file of attention patterns."""

    what = "attention"
    entries = "attention"

    n_heads: Measure


class LensHead(PerTokenHead):
    """The head of a logit-lens file."""

    what = "logit lens"
    entries = "predictions"

    top_k: Annotated[int, Field(ge=1)]


def _without_entries(path: Path) -> Any:
    """The content of a file whose entries come last, with none of them; `None` for any other file."""
    try:
        if not path.stat().st_size:
            return None
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            first = _FIRST_ENTRY.search(data)
            end = data[-_TAIL:].translate(None, b" \t\r\n")
            if first is None or not end.endswith(b"]}]}"):  # of a list, an entry, all entries, the file
                return None
            return orjson.loads(data[: first.start()] + b"]}")
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError:
        return None


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
