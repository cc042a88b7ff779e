"""Reading single tokens from large JSON files.

Attention and logit-lens files contain a list of objects, one per token, each starting with the key `token_idx`. For
long contexts they reach gigabytes. The offsets of the objects are located once in the memory-mapped file; after that,
reading a token reads only its own bytes. The pattern cannot match inside a JSON string, where quotation marks are
escaped.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from json import JSONDecoder
from pathlib import Path
from typing import Any

import orjson

from tlcapture.errors import InputError, StorageError
from tlcapture.storage.remote.roots import local

_LISTS = ("attention", "predictions")  # the keys of the entries
_ENTRY_START = re.compile(rb'\{\s*"token_idx"\s*:\s*(\d{1,9})')


class TokenEntries:
    """The entries of one file by `token_idx`.

    Raises `StorageError` if the file is missing, damaged, or of another form.
    """

    def __init__(self, path: Path):
        self.path = path
        state = _stat(local(path))
        self._spans, self._rest = _scan(path, state.st_mtime_ns, state.st_size, state.st_ino)

    @property
    def rest(self) -> dict[str, Any]:
        """The content of the file without its entries."""
        return _parse(self.path, self._rest)

    @property
    def token_indices(self) -> list[int]:
        """Indices of the tokens that have an entry."""
        return list(self._spans)

    def __getitem__(self, token: int) -> dict[str, Any]:
        if token not in self._spans:
            raise no_token(self.path, token, is_partial="positions" in self.rest)
        start, stop = self._spans[token]
        with local(self.path).open("rb") as file:
            file.seek(start)
            return _parse(self.path, file.read(stop - start))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All entries, one at a time."""
        with local(self.path).open("rb") as file:
            for start, stop in self._spans.values():
                file.seek(start)
                yield _parse(self.path, file.read(stop - start))


def no_token(path: Path, token: int, *, is_partial: bool) -> InputError:
    """The error for a token without an entry in a file, which may be of some tokens only."""
    partial = ": it was captured with --tokens, without this one" if is_partial else ""
    return InputError(f"{path.name} has no token {token}{partial}")


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None


@lru_cache(maxsize=64)
def _scan(path: Path, _modified: int, size: int, _inode: int) -> tuple[dict[int, tuple[int, int]], bytes]:
    """Start and end of each entry, and the file without its entries; cached until the file changes."""
    if not size:
        raise StorageError(f"{path}: is empty")
    try:
        with local(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            starts = [(match.start(), int(match[1])) for match in _ENTRY_START.finditer(data)]
            if not starts:
                return {}, bytes(data)
            last = starts[-1][0]
            end = last + _length_of_first_value(data[last:])
            stops = [start for start, _ in starts[1:]] + [end]
            tokens, rest = [token for _, token in starts], data[: starts[0][0]] + data[end:]
            others = _parse(path, rest)
            if all(others.get(name) != [] for name in _LISTS):
                raise StorageError(f"{path}: its entries do not lie in a list under {' or '.join(_LISTS)}")
            if tokens != list(range(len(starts))) and not _are_kept(tokens, others):
                raise StorageError(f"{path}: its entries are not for tokens 0, 1, 2, ... nor for its positions")
            spans = {token: (start, stop) for (start, token), stop in zip(starts, stops, strict=True)}
            return spans, rest
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or an integer of thousands of digits
        raise StorageError(f"{path}: its last entry is cut off or damaged") from None


def _are_kept(tokens: Sequence[int], rest: Mapping[str, Any]) -> bool:
    """Whether tokens match the `positions` in a file; the last token has no entry in a logit lens."""
    kept = rest.get("positions")
    return isinstance(kept, list) and tokens in (kept, kept[:-1])


def _length_of_first_value(data: bytes) -> int:
    text = data.decode("utf-8")
    _, end = JSONDecoder().raw_decode(text)
    return len(text[:end].encode("utf-8"))


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data.rstrip(b", \r\n\t"))
    except orjson.JSONDecodeError as error:
        raise StorageError(f"{path}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path}: expected a JSON object")
    return value
