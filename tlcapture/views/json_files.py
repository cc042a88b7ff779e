"""The content of attention and logit-lens files, checked: a head, and an entry per token.

A file may be large. `token_entries` reads single entries, and each is checked when it is read. The compact form of a
file (`saved_attention`, `saved_lens`) has the same head.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from tlcapture.errors import InputError, StorageError
from tlcapture.names import COMPACT, base_set, capture_name
from tlcapture.storage.compact.compact_files import is_compact, open_compact
from tlcapture.storage.files import read_json
from tlcapture.storage.regular_files import check_regular
from tlcapture.storage.remote.roots import local
from tlcapture.storage.validation import Count, FileContent, Layer, Share, checked, first_problem, not_valid
from tlcapture.text import layers_named
from tlcapture.views.kept_tokens import Positions, stated_positions

Measure = Annotated[int, Field(ge=1, le=10_000)]
Pattern = list[list[Share]]  # [head][key]
_FIRST_ENTRY = re.compile(rb'\{\s*"token_idx"')
_TAIL = 256
Head = TypeVar("Head", bound="PerTokenHead")
Entry = TypeVar("Entry", bound="_Entry")


class PerTokenHead(FileContent):
    """The content of a file without its entries, which exist for the tokens in `positions`, by default for all."""

    what: ClassVar[str] = "attention or logit lens"
    entries: ClassVar[str] = ""

    tokens: list[str]
    n_prompt_tokens: Count
    n_layers: Measure
    n_response_tokens: Count | None = None
    positions: list[Count] | None = None
    layers: list[Layer] | None = Field(default=None, min_length=1)

    @property
    def kept_layers(self) -> list[int]:
        """The layers that the file was asked to hold: all, unless it states some."""
        return list(range(self.n_layers)) if self.layers is None else self.layers

    @property
    def positions_held(self) -> Positions:
        """The tokens whose entries the file has."""
        return stated_positions(self, self.n_prompt_tokens, len(self.tokens))

    @property
    def n_entries_by_layer(self) -> int:
        """The number of layers that an entry lists: all, with null for layers without weights."""
        return self.n_layers

    @classmethod
    def of(cls: type[Head], value: Any, path: Path) -> Head:
        """The head of a file, given its content; raises `StorageError` for an invalid one, or one of another prompt.

        The prompt must be the one in the path of a file in an experiment.
        """
        found = checked(cls, value, path, cls.what)
        if (other := found._prompt_named_otherwise(path)) is not None:
            raise StorageError(f"{path}: it names prompt {other}: it was moved or renamed")
        return found

    @classmethod
    def read(cls: type[Head], path: Path) -> Head:
        """The head of a file of either form; raises `StorageError` for any other file, and for one that is cut off."""
        if is_compact(path):
            return cls.of(open_compact(path, cls.what)[1], path)
        value = _without_entries(path)
        return cls.of(read_json(path) if value is None else value, path)

    @classmethod
    def check_file(cls, path: Path) -> None:
        """Raise `StorageError` for a file that is cut off or of another kind; reads only the end of its entries."""
        head = cls.read(path)
        if not isinstance((head.model_extra or {}).get(cls.entries), list):
            raise not_valid(path, cls.what, f"{cls.entries}: expected a list")

    def _prompt_named_otherwise(self, path: Path) -> str | None:
        """The prompt that the content names, if it contradicts the path. Variants are named by the path alone."""
        extra, parts = self.model_extra or {}, path.parts
        is_in_place = "per_token" in parts and path.suffix in (".json", COMPACT)  # not about to be moved here
        if extra.get("prompt_id") is None or not is_in_place:
            return None
        name = f"{capture_name(extra['prompt_id'], extra.get('sample'))}"
        in_set = base_set("/".join(parts[len(parts) - parts[::-1].index("per_token") : -1]))
        named_set = extra.get("prompt_set", in_set)
        is_same = (name, named_set) == (path.stem.removesuffix("_attention").removesuffix("_logit_lens"), in_set)
        return None if is_same else f"{named_set}/{name}"

    @model_validator(mode="after")
    def _counts_agree(self) -> PerTokenHead:
        n_response = len(self.tokens) - self.n_prompt_tokens
        if n_response < 0 or self.n_response_tokens not in (None, n_response):
            stated = "" if self.n_response_tokens is None else f" and {self.n_response_tokens} of the response"
            raise ValueError(f"{len(self.tokens)} tokens, but it states {self.n_prompt_tokens} of the prompt{stated}")
        _ = self.positions_held
        if self.kept_layers != sorted(set(self.kept_layers)) or self.kept_layers[-1] >= self.n_layers:
            raise ValueError(f"layers: expected ascending numbers below {self.n_layers}, each once")
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

    @property
    def n_entries_by_layer(self) -> int:
        """The number of layers that an entry lists: only the kept ones."""
        return len(self.kept_layers)


def head_of(path: Path) -> AttentionHead | LensHead:
    """The head of a file of attention or of the logit lens, depending on its name, in either form."""
    return AttentionHead.read(path) if path.stem.endswith("_attention") else LensHead.read(path)


def _without_entries(path: Path) -> Any:
    """The content of a file without its entries, if they come last; `None` for any other file."""
    check_regular(path)
    try:
        if not path.stat().st_size:
            return None
        with local(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
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
        expected = head.n_entries_by_layer
        if len(entry.by_layer) != expected:
            n_layers = len(entry.by_layer)
            raise not_valid(path, head.what, f"token {entry.token_idx} has {n_layers} layers, not {expected}")
        if entry.token_idx >= len(head.tokens):
            raise not_valid(path, head.what, f"token {entry.token_idx} of {len(head.tokens)}")
        return entry


class AttentionEntry(_Entry):
    """One token's attention: `by_layer[layer][head]` has one weight for each token up to it.

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
    """The predictions of one token in an overview: only the likeliest one of each layer is checked."""

    actual_next_token: str
    by_layer: list[_OverviewLayer]


_PATTERN = TypeAdapter(Pattern)


def no_weights(path: Path, layer: int, kept: Sequence[int] | None, present: Sequence[int]) -> InputError:
    """The error for a layer without weights: it was not among those `kept`, or has no attention."""
    if kept is not None and layer not in kept:
        return InputError(f"{path}: layer {layer} was not kept: attention was kept at {layers_named(kept)}")
    return InputError(
        f"{path}: layer {layer} has no attention: {layers_named(present)} {'has' if len(present) == 1 else 'have'} it"
    )


def pattern_of_layer(entry: Any, layer: int, path: Path, kept: Sequence[int] | None = None) -> Pattern:
    """One layer's weights in an attention entry, without checking other layers; `kept` comes from the file's head.

    Raises `InputError` for a layer without attention, and `StorageError` for a missing one.
    """
    try:
        if entry["by_layer"][layer] is None:
            present = [number for number, pattern in enumerate(entry["by_layer"]) if pattern is not None]
            if not present:
                raise StorageError(f"{path}: token {entry['token_idx']} has no weights in any layer")
            raise no_weights(path, layer, kept, present)
        return _PATTERN.validate_python(entry["by_layer"][layer], strict=True)
    except ValidationError as error:
        raise StorageError(f"{path}: no weights of layer {layer}: {first_problem(error)}") from None
    except (KeyError, TypeError, IndexError):
        raise StorageError(f"{path}: an entry has no layer {layer}") from None
