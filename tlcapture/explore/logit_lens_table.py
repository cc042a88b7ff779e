"""The logit lens of one capture, with its tokens: what a notebook shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import StorageError
from tlcapture.text import printable
from tlcapture.views.json_files import LensEntry, LensHead

_MOST_COLUMNS = 60
_SHOWN = 5  # predictions that show when the mouse is over a cell


@dataclass(frozen=True, eq=False, repr=False)
class LogitLensTable:
    """What each layer would predict behind each token that has a next one.

    Attributes:
        top_tokens: `[layer][token][k]`, the likeliest next tokens, likeliest first.
        top_probs: `[n_layers, n_predictions, k]`, their probabilities.
        actual_rank, actual_prob: `[n_layers, n_predictions]` of the token that came; ranks count from 1.
        source: where it comes from: a file, or the stored residuals and the model's unembedding.
    """

    prompt_set: str
    prompt_id: str
    tokens: Sequence[str]
    n_prompt_tokens: int
    top_tokens: Sequence[Sequence[Sequence[str]]] = field(repr=False)
    top_probs: NDArray[np.float64] = field(repr=False)
    actual_rank: NDArray[np.int64] = field(repr=False)
    actual_prob: NDArray[np.float64] = field(repr=False)
    source: str

    def __post_init__(self) -> None:
        shape = (len(self.top_tokens), len(self.tokens) - 1)
        if not self.top_probs.shape[:2] == self.actual_rank.shape == self.actual_prob.shape == shape:
            raise StorageError(f"predictions of shape {list(self.top_probs.shape)} for {len(self.tokens)} tokens")

    @property
    def n_layers(self) -> int:
        return len(self.top_probs)

    @property
    def n_predictions(self) -> int:
        return len(self.tokens) - 1

    def __repr__(self) -> str:
        ranks = self.actual_rank[-1, max(0, self.n_prompt_tokens - 1) :]
        first = f", its last layer ranks {int((ranks == 1).sum())} of {len(ranks)} response tokens first"
        return (
            f"LogitLensTable({self.prompt_set}/{self.prompt_id}, {self.n_layers} layers, {self.n_predictions} "
            f"predictions{first if len(ranks) else ''}, from {self.source})"
        )

    def _repr_html_(self) -> str:
        """A table, layers down and tokens across, of the likeliest next token; of long captures a part."""
        columns = self._columns()
        head = "".join(f"<th>{escape(printable(self.tokens[place]))}</th>" for place in columns)
        rows = "".join(
            f"<tr><th>{layer}</th>{''.join(self._cell(layer, place) for place in columns)}</tr>"
            for layer in reversed(range(self.n_layers))
        )
        whole = len(columns) == self.n_predictions
        part = "" if whole else f"; tokens {columns.start} to {columns.stop - 1} of {len(self.tokens)}"
        caption = f"{self.prompt_set}/{self.prompt_id}: likeliest next token by layer{part}"
        return (
            f'<div class="tlcapture-lens" style="overflow-x:auto"><div style="opacity:0.7">{escape(caption)}</div>'
            f'<table style="font-family:monospace;font-size:80%;white-space:pre"><tr><th>layer</th>{head}</tr>{rows}'
            "</table></div>"
        )

    def _columns(self) -> range:
        """All tokens, or of long captures those from which the response is predicted."""
        if self.n_predictions <= _MOST_COLUMNS:
            return range(self.n_predictions)
        start = max(0, min(self.n_prompt_tokens - 1, self.n_predictions - _MOST_COLUMNS))
        return range(start, start + _MOST_COLUMNS)

    def _cell(self, layer: int, place: int) -> str:
        top = list(zip(self.top_tokens[layer][place], self.top_probs[layer, place], strict=True))
        lines = [f"{prob:.4g} {printable(token)!r}" for token, prob in top[:_SHOWN]]
        rank, prob = self.actual_rank[layer, place], self.actual_prob[layer, place]
        lines.append(f"came: {printable(self.tokens[place + 1])!r}, rank {rank}, {prob:.4g}")
        colour = f"background:rgba(31,119,180,{0.7 * float(top[0][1]):.3f})"
        return f'<td title="{escape(chr(10).join(lines))}" style="{colour}">{escape(printable(top[0][0]))}</td>'


def table_of_file(content: Mapping[str, Any], path: Path, prompt_set: str, prompt_id: str) -> LogitLensTable:
    """The table that a logit-lens file holds; raises `StorageError` for a file that holds something else."""
    head = LensHead.of({key: value for key, value in content.items() if key != "predictions"}, path)
    found = content.get("predictions")
    entries = [LensEntry.of(entry, path, head) for entry in (found if isinstance(found, list) else [])]
    if [entry.token_idx for entry in entries] != list(range(len(head.tokens) - 1)):
        raise StorageError(f"{path}: it has not one entry for each token that has a next one")
    if any(len(layer.top_k) != head.top_k for entry in entries for layer in entry.by_layer):
        raise StorageError(f"{path}: it has not {head.top_k} predictions in every layer")
    by_layer = [[entry.by_layer[layer] for entry in entries] for layer in range(head.n_layers)]
    shape = (head.n_layers, len(entries))
    probs = [[[top.prob for top in cell.top_k] for cell in row] for row in by_layer]
    ranks = [[cell.actual_rank for cell in row] for row in by_layer]
    actual = [[cell.actual_prob for cell in row] for row in by_layer]
    return LogitLensTable(
        prompt_set=prompt_set,
        prompt_id=prompt_id,
        tokens=head.tokens,
        n_prompt_tokens=head.n_prompt_tokens,
        top_tokens=[[[top.token for top in cell.top_k] for cell in row] for row in by_layer],
        top_probs=np.array(probs, dtype=np.float64).reshape(*shape, head.top_k),
        actual_rank=np.array(ranks, dtype=np.int64).reshape(shape),
        actual_prob=np.array(actual, dtype=np.float64).reshape(shape),
        source=path.name,
    )
