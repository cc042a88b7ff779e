"""Which tokens an existing file of attention, logit lens or internals holds, as far as it holds only some.

Such a file states `positions` before anything else, so that any other is told apart by its first bytes.
"""

from __future__ import annotations

from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.errors import StorageError
from tlcapture.storage.compact_files import is_compact
from tlcapture.storage.files import read_tensors
from tlcapture.storage.remote_roots import local
from tlcapture.views.json_files import PerTokenHead, head_of
from tlcapture.views.kept_tokens import KeptTokens, Positions, kept_of

_HEAD = 512
_JSON, _PICKLE = (b'{"positions":', b'{"layers":'), b"X\t\x00\x00\x00positions"


def wanted_positions(tokens: KeptTokens | None, capture: Capture, *, fresh: bool) -> Positions:
    """The tokens that outputs of a capture are to hold: those chosen, or without a choice those that it holds.

    Without a choice, a `fresh` capture is to hold all.
    """
    if tokens is None and not fresh:
        return capture.positions
    return kept_of(tokens, len(capture.prompt.tokens), len(capture.tokens))


def lacks_positions(path: Path, tokens: KeptTokens | None) -> bool:
    """Whether a file lacks a token that is wanted. Without a choice, what an existing file holds is enough."""
    if tokens is None:
        return False
    try:
        if is_compact(path):
            compact = head_of(path)
            return not compact.positions_held.includes(tokens.of(compact.n_prompt_tokens, len(compact.tokens)))
        with local(path).open("rb") as file:
            head = file.read(_HEAD)
        if path.suffix == ".json":
            if not head.startswith(_JSON):
                return False
            stated = PerTokenHead.read(path)
            held, n_prompt = stated.positions_held, stated.n_prompt_tokens
        elif _PICKLE in head:
            value = read_tensors(path)
            n_prompt = int(value["n_prompt_tokens"])
            held = Positions.of(value["positions"], n_prompt, len(value["tokens"]))
        else:
            return False
    except (StorageError, OSError, ValueError, KeyError, TypeError):
        return False  # a file that cannot be read is reported by whoever replaces it
    return not held.includes(tokens.of(n_prompt, held.n_tokens))
