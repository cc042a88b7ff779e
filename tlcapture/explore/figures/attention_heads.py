"""The attention patterns of one layer of a capture, with its tokens, for display in a notebook.

A notebook draws them with circuitsvis. Its own display fetches code from another host; here, the code of the
installed package is embedded next to the data.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError, StorageError
from tlcapture.names import PromptId, capture_name
from tlcapture.text import printable
from tlcapture.views.json_files import AttentionHead

_MOST_TOKENS = 160  # circuitsvis draws a rectangle per weight
_BUNDLE = Path("dist", "cdn", "iife.js")


@dataclass(frozen=True, eq=False, repr=False)
class AttentionHeads:
    """The attention weights of all heads of one layer.

        heads = cap.attention(12)
        heads.name, heads.n_heads, heads.positions, heads.patterns.shape  # [n_heads, query, key]

    Attributes:
        prompt_set, prompt_id, sample: the capture; `name` is that of its files.
        layer: counts from 0.
        tokens: texts of all tokens, prompt first.
        n_prompt_tokens: how many of them belong to the prompt.
        patterns: `[n_heads, query, key]`, float32; each row sums to 1 over the keys up to its query. Rows of queries
            that were not kept are NaN.
        source: a file name, or `a forward pass` over the capture's tokens.

    Raises `StorageError` if the patterns do not match the tokens.
    """

    prompt_set: str
    prompt_id: PromptId
    layer: int
    tokens: Sequence[str]
    n_prompt_tokens: int
    patterns: NDArray[np.float32] = field(repr=False)
    source: str
    sample: int | None = None

    def __post_init__(self) -> None:
        if self.patterns.ndim != 3 or self.patterns.shape[1:] != (len(self.tokens), len(self.tokens)):
            raise StorageError(f"patterns of shape {list(self.patterns.shape)} for {len(self.tokens)} tokens")

    @property
    def name(self) -> PromptId:
        """The capture's name within its set: `7`, or `7.s1` for a sample."""
        return capture_name(self.prompt_id, self.sample)

    @property
    def positions(self) -> list[int]:
        """The tokens whose weights were kept: all, unless it was captured with `--tokens`."""
        return np.flatnonzero(~np.isnan(self.patterns[0, :, 0])).tolist()

    @property
    def n_heads(self) -> int:
        """Number of attention heads in the layer."""
        return len(self.patterns)

    def pattern(self, head: SupportsIndex) -> NDArray[np.float32]:
        """One head's weights `[query, key]`; raises `InputError` if the layer has no such head.

        Example:
            heads.pattern(0)[-1].argmax()  # what the last token looks at most
        """
        head_index = index(head)
        if not 0 <= head_index < self.n_heads:
            raise InputError(f"no head {head_index}: layer {self.layer} has heads 0 to {self.n_heads - 1}")
        return self.patterns[head_index]

    def __repr__(self) -> str:
        return (
            f"AttentionHeads({self.prompt_set}/{self.name}, layer {self.layer}, {self.n_heads} heads, "
            f"{len(self.tokens)} tokens, from {self.source})"
        )

    def _repr_html_(self) -> str:
        bundle = _circuitsvis()
        n_missing = len(self.tokens) - len(self.positions)
        if bundle is None or len(self.tokens) > _MOST_TOKENS or n_missing:
            which = f"{n_missing} tokens were not kept" if n_missing else f"more than {_MOST_TOKENS} tokens"
            why = (
                "run 'pip install circuitsvis' to draw them here"
                if bundle is None
                else f"{which}: draw one head with cap.plot.attention(layer, head)"
            )
            return f"<code>{escape(repr(self))}</code> <small>{escape(why)}</small>"
        return _element(
            bundle,
            {
                "attention": np.round(self.patterns.astype(np.float64), 4).tolist(),
                "attentionHeadNames": [f"L{self.layer}H{head}" for head in range(self.n_heads)],
                "tokens": [printable(token) for token in self.tokens],
            },
        )


@dataclass(frozen=True, eq=False)
class HeadsByRow:
    """The patterns of several layers in memory, read query by query like those of a file, see `ReadByRow`."""

    head: AttentionHead
    heads: Mapping[int, AttentionHeads]

    @classmethod
    def of(cls, heads: Mapping[int, AttentionHeads], n_layers: int) -> HeadsByRow:
        """The patterns of at least one of the layers of a model."""
        first = next(iter(heads.values()))
        head = AttentionHead(
            tokens=list(first.tokens), n_prompt_tokens=first.n_prompt_tokens, n_layers=n_layers, n_heads=first.n_heads
        )
        return cls(head, heads)

    @property
    def present_layers(self) -> list[int]:
        """The layers that have patterns."""
        return list(self.heads)

    def rows(self, layers: Sequence[int]) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Layer, query and the query's weights `[n_heads, query + 1]`, for some of these layers."""
        for layer in layers:
            for query in self.heads[layer].positions:
                yield layer, query, self.heads[layer].patterns[:, query, : query + 1]


def _circuitsvis() -> str | None:
    """The JavaScript of the installed circuitsvis, escaped for embedding in a page; `None` if not installed."""
    spec = importlib.util.find_spec("circuitsvis")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders if (path := Path(folder) / _BUNDLE).is_file()]
    # In JavaScript strings "<\/script" equals "</script", and it does not end the HTML element.
    return files[0].read_text(encoding="utf-8").replace("</script", "<\\/script") if files else None


def _element(bundle: str, properties: Mapping[str, Any]) -> str:
    """A circuitsvis element, its properties escaped so that none of them is parsed as markup."""
    element_id = f"circuits-vis-{secrets.token_hex(6)}"
    data = json.dumps(properties).replace("<", "\\u003c")
    return (
        f'<div id="{element_id}" style="margin:15px 0"></div>\n<script type="module">\n{bundle}\n'
        f'CircuitsVis.render("{element_id}", CircuitsVis.AttentionHeads, {data});\n</script>'
    )
