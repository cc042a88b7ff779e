"""Logit-lens files of either form, read as one kind of object; and the compact form, written from arrays.

    saved = read_lens(path)               # {id}_logit_lens.json or {id}_logit_lens.safetensors
    saved.entry(12).by_layer              # a LensLayer for each kept layer
    saved.numbers().actual_rank           # [n_layers, n_predictions]

The compact form has `top_ids` and `top_probs` `[n_predictions, n_layers, top_k]`, `actual_rank` and `actual_prob`
`[n_predictions, n_layers]`, and the texts of the ids: `ids` `[n_ids]` and `texts`, a JSON list as bytes. Its numbers
are those of the JSON form. Loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tlcapture.errors import StorageError
from tlcapture.storage.compact.compact_files import compact_metadata, is_compact, open_compact
from tlcapture.storage.compact.safetensors_files import TensorSpec, write_safetensors
from tlcapture.storage.files import Written
from tlcapture.storage.rounding import PROBABILITY_DIGITS, round_significant, rounded_for_json
from tlcapture.storage.validation import not_valid
from tlcapture.views.json_files import LensEntry, LensHead, LensOverview
from tlcapture.views.token_entries import TokenEntries, no_token

KIND = "logit lens"
_NUMBERS = "4 significant digits"
_DTYPES = {"top_ids": "I32", "top_probs": "F32", "actual_rank": "I32", "actual_prob": "F64"}


@dataclass(frozen=True, eq=False)
class LensNumbers:
    """The predictions in a file, by kept layer.

    Attributes:
        top_tokens: `[layer][prediction][k]`, texts of the most likely next tokens, most likely first.
        top_probs: `[n_layers, n_predictions, k]`, their probabilities.
        actual_rank, actual_prob: `[n_layers, n_predictions]`, of the actual next token.
    """

    top_tokens: Sequence[Sequence[Sequence[str]]]
    top_probs: NDArray[np.float64]
    actual_rank: NDArray[np.int64]
    actual_prob: NDArray[np.float64]


def read_lens(path: Path) -> SavedLens:
    """A prompt's logit-lens file of either form; raises `StorageError` for any other file."""
    return _CompactLens(path) if is_compact(path) else _JsonLens(path)


class SavedLens(ABC):
    """The logit lens of a prompt in a file; only requested parts are read.

    Attributes:
        path: the file.
        head: the content of the file without the predictions.
    """

    path: Path
    head: LensHead

    @property
    @abstractmethod
    def token_indices(self) -> list[int]:
        """The tokens after which there is a prediction in the file."""

    @abstractmethod
    def entry(self, token: int) -> LensEntry:
        """The predictions after a token; raises `InputError` if the file does not have it."""

    @abstractmethod
    def overview(self) -> Iterator[LensOverview]:
        """The likeliest prediction after each token, and rank and probability of the actual one."""

    @abstractmethod
    def numbers(self) -> LensNumbers:
        """All predictions; raises `StorageError` if the file is damaged."""


class _JsonLens(SavedLens):
    def __init__(self, path: Path):
        self.path = path
        self._entries = TokenEntries(path)
        self.head = LensHead.of(self._entries.rest, path)

    @property
    def token_indices(self) -> list[int]:
        return self._entries.token_indices

    def entry(self, token: int) -> LensEntry:
        return LensEntry.of(self._entries[token], self.path, self.head)

    def overview(self) -> Iterator[LensOverview]:
        return (LensOverview.of(entry, self.path, self.head) for entry in self._entries)

    def numbers(self) -> LensNumbers:
        head = self.head
        entries = [LensEntry.of(entry, self.path, head) for entry in self._entries]
        if [entry.token_idx for entry in entries] != list(head.positions_held.with_next):
            raise StorageError(f"{self.path}: it does not have one entry per token that has a next token")
        if any(len(layer.top_k) != head.top_k for entry in entries for layer in entry.by_layer):
            raise StorageError(f"{self.path}: it does not have {head.top_k} predictions in every layer")
        by_layer = [[entry.by_layer[row] for entry in entries] for row in range(head.n_entries_by_layer)]
        shape = (head.n_entries_by_layer, len(entries))
        probs = [[[top.prob for top in cell.top_k] for cell in row] for row in by_layer]
        ranks = [[cell.actual_rank for cell in row] for row in by_layer]
        actual = [[cell.actual_prob for cell in row] for row in by_layer]
        return LensNumbers(
            top_tokens=[[[top.token for top in cell.top_k] for cell in row] for row in by_layer],
            top_probs=np.array(probs, dtype=np.float64).reshape(*shape, head.top_k),
            actual_rank=np.array(ranks, dtype=np.int64).reshape(shape),
            actual_prob=np.array(actual, dtype=np.float64).reshape(shape),
        )


class _CompactLens(SavedLens):
    def __init__(self, path: Path):
        self.path = path
        self._file, content = open_compact(path, KIND)
        self.head = LensHead.of(content, path)
        held = self.head.positions_held
        self._after = held.with_next
        shape = (len(self._after), self.head.n_entries_by_layer)
        for name, dtype in _DTYPES.items():
            self._file.check(name, dtype, (*shape, self.head.top_k) if name.startswith("top") else shape)

    @property
    def token_indices(self) -> list[int]:
        return list(self._after)

    def entry(self, token: int) -> LensEntry:
        if token not in self._after:
            raise no_token(self.path, token, is_partial=self.head.positions is not None)
        return LensEntry.of(self._content(self._after.index(token), self.head.top_k), self.path, self.head)

    def overview(self) -> Iterator[LensOverview]:
        return (LensOverview.of(self._content(row, 1), self.path, self.head) for row in range(len(self._after)))

    def numbers(self) -> LensNumbers:
        ids, probs, ranks, actual = self._arrays
        return LensNumbers(
            top_tokens=[[self._named(row) for row in layer] for layer in ids.transpose(1, 0, 2)],
            top_probs=_rounded(probs, self.path).transpose(1, 0, 2),
            actual_rank=ranks.T.astype(np.int64),
            actual_prob=actual.T.copy(),
        )

    @cached_property
    def _arrays(self) -> list[NDArray[Any]]:
        return [self._file.array(name) for name in _DTYPES]

    def _content(self, row: int, top_k: int) -> dict[str, Any]:
        """An entry of the JSON form, with the likeliest `top_k` predictions."""
        ids, probs, ranks, actual = (array[row] for array in self._arrays)
        shown = _rounded(probs[:, :top_k], self.path).tolist()
        return {
            "token_idx": self._after[row],
            "actual_next_token": self.head.tokens[self._after[row] + 1],
            "by_layer": [
                {
                    "layer": layer,
                    "top_k": [
                        {"token": text, "prob": prob}
                        for text, prob in zip(self._named(ids[at, :top_k]), shown[at], strict=True)
                    ],
                    "actual_rank": int(ranks[at]),
                    "actual_prob": float(actual[at]),
                }
                for at, layer in enumerate(self.head.kept_layers)
            ],
        }

    def _named(self, ids: NDArray[Any]) -> list[str]:
        try:
            return [self._texts[number] for number in ids.tolist()]
        except KeyError as error:
            raise not_valid(self.path, KIND, f"no text of the id {error}") from None

    @cached_property
    def _texts(self) -> dict[int, str]:
        try:
            texts = orjson.loads(self._file.array("texts").tobytes())
            return dict(zip(self._file.array("ids").tolist(), map(_text, texts), strict=True))
        except (orjson.JSONDecodeError, TypeError, ValueError):
            raise not_valid(self.path, KIND, "texts: expected one for each of its ids") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _rounded(probs: NDArray[Any], path: Path) -> NDArray[np.float64]:
    if not ((probs >= 0) & (probs <= 1)).all():  # NaN too
        raise not_valid(path, KIND, "a probability is not between 0 and 1")
    return round_significant(probs, PROBABILITY_DIGITS)


def write_lens(
    path: Path,
    head: Mapping[str, Any],
    top_ids: NDArray[Any],
    top_probs: NDArray[np.float32],
    actual_rank: NDArray[Any],
    actual_prob: NDArray[np.float32],
    token_texts: Callable[[Sequence[int]], list[str]],
) -> Written:
    """Write a prompt's logit lens in the compact form.

    Args:
        head: the content of the JSON form without `predictions`.
        top_ids, top_probs: `[n_layers, n_predictions, top_k]`.
        actual_rank, actual_prob: `[n_layers, n_predictions]`.

    Raises:
        NumericalError: a probability is NaN or inf.
    """
    ids = np.unique(top_ids)
    texts = np.frombuffer(orjson.dumps(token_texts(ids.tolist())), np.uint8)
    arrays = {
        "top_ids": top_ids.transpose(1, 0, 2),
        "top_probs": rounded_for_json(top_probs, PROBABILITY_DIGITS).transpose(1, 0, 2),
        "actual_rank": actual_rank.T,
        "actual_prob": round_significant(actual_prob, PROBABILITY_DIGITS).T,
        "ids": ids,
        "texts": texts,
    }
    dtypes = {**_DTYPES, "ids": "I32", "texts": "U8"}
    specs = {name: TensorSpec(dtypes[name], array.shape) for name, array in arrays.items()}
    pieces = {name: [array] for name, array in arrays.items()}
    return write_safetensors(path, specs, compact_metadata(KIND, head, _NUMBERS), pieces)
