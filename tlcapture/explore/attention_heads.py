"""The attention patterns of one layer of a capture, with its tokens: what a notebook shows.

In a notebook they are drawn by circuitsvis, whose own display fetches its code from another host when
there is a network; here its code goes into the page, beside the data.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError, StorageError
from tlcapture.text import printable
from tlcapture.views.json_files import AttentionHead, pattern_of_layer

_MOST_TOKENS = 160  # circuitsvis draws a rectangle for every weight
_BUNDLE = Path("dist", "cdn", "iife.js")


@dataclass(frozen=True, eq=False, repr=False)
class AttentionHeads:
    """Weights `[n_heads, query, key]` of a layer, each row summing to 1 over the keys up to its query.

    `source` says where they come from: a file, or a forward pass over the capture's tokens.
    """

    prompt_set: str
    prompt_id: str
    layer: int
    tokens: Sequence[str]
    n_prompt_tokens: int
    patterns: NDArray[np.float32] = field(repr=False)
    source: str

    def __post_init__(self) -> None:
        if self.patterns.ndim != 3 or self.patterns.shape[1:] != (len(self.tokens), len(self.tokens)):
            raise StorageError(f"patterns of shape {list(self.patterns.shape)} for {len(self.tokens)} tokens")

    @property
    def n_heads(self) -> int:
        return len(self.patterns)

    def pattern(self, head: SupportsIndex) -> NDArray[np.float32]:
        """One head's weights `[query, key]`; raises `InputError` for a head that there is not."""
        number = index(head)
        if not 0 <= number < self.n_heads:
            raise InputError(f"no head {number}: layer {self.layer} has heads 0 to {self.n_heads - 1}")
        return self.patterns[number]

    def __repr__(self) -> str:
        return (
            f"AttentionHeads({self.prompt_set}/{self.prompt_id}, layer {self.layer}, {self.n_heads} heads, "
            f"{len(self.tokens)} tokens, from {self.source})"
        )

    def _repr_html_(self) -> str:
        bundle = _circuitsvis()
        if bundle is None or len(self.tokens) > _MOST_TOKENS:
            why = (
                "pip install 'tlcapture[ipython]' draws them here"
                if bundle is None
                else f"more than {_MOST_TOKENS} tokens: cap.plot.attention(layer, head) draws one head"
            )
            return f"<code>{escape(repr(self))}</code> <small>{escape(why)}</small>"
        return _element(
            bundle,
            "AttentionHeads",
            {
                "attention": np.round(self.patterns.astype(np.float64), 4).tolist(),
                "attentionHeadNames": [f"L{self.layer}H{head}" for head in range(self.n_heads)],
                "tokens": [printable(token) for token in self.tokens],
            },
        )


def heads_of_file(content: Mapping[str, Any], path: Path, layer: int) -> NDArray[np.float32]:
    """A layer's weights `[n_heads, query, key]` from what an attention file holds.

    Raises `StorageError` for a file that holds something else.
    """
    head = AttentionHead.of({key: value for key, value in content.items() if key != "attention"}, path)
    entries, n_tokens = content.get("attention"), len(head.tokens)
    if not isinstance(entries, list) or [_place(entry) for entry in entries] != list(range(n_tokens)):
        raise StorageError(f"{path}: it has not one entry a token")
    rows = [pattern_of_layer(entry, layer, path) for entry in entries]
    if any(len(row) != head.n_heads or any(len(w) != token + 1 for w in row) for token, row in enumerate(rows)):
        raise StorageError(f"{path}: its patterns are not of {head.n_heads} heads and {n_tokens} tokens")
    patterns = np.zeros((head.n_heads, n_tokens, n_tokens), dtype=np.float32)
    for token, row in enumerate(rows):
        patterns[:, token, : token + 1] = row
    return patterns


def _place(entry: Any) -> Any:
    return entry.get("token_idx") if isinstance(entry, dict) else None


def _circuitsvis() -> str | None:
    """circuitsvis's code as it comes with its package, fit to stand in a page; `None` where it is not installed."""
    spec = importlib.util.find_spec("circuitsvis")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders if (path := Path(folder) / _BUNDLE).is_file()]
    # As a text, "<\/script" is the same in JavaScript, and does not end the element.
    return files[0].read_text(encoding="utf-8").replace("</script", "<\\/script") if files else None


def _element(bundle: str, name: str, properties: Mapping[str, Any]) -> str:
    """A circuitsvis element. Nothing of its properties is markup to the page that holds it."""
    place = f"circuits-vis-{secrets.token_hex(6)}"
    data = json.dumps(properties).replace("<", "\\u003c")
    return (
        f'<div id="{place}" style="margin:15px 0"></div>\n<script type="module">\n{bundle}\n'
        f'CircuitsVis.render("{place}", CircuitsVis.{name}, {data});\n</script>'
    )
