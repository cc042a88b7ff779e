"""The logit lens of one capture, with its tokens, for display in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import StorageError
from tlcapture.names import PromptId, capture_name
from tlcapture.text import printable
from tlcapture.views.saved_lens import SavedLens

if TYPE_CHECKING:
    from pandas import DataFrame

    from tlcapture.views.logit_lens import LogitLens

_MOST_COLUMNS = 60
_MOST_LISTED = 5  # predictions listed for a cell


@dataclass(frozen=True, eq=False, repr=False)
class LogitLensTable:
    """The next-token predictions of every layer after each token except the last, or after each kept token.

        lens = cap.logit_lens()
        lens.name, lens.n_layers, lens.layer_numbers, lens.n_predictions, lens.after
        lens.actual_prob[:, -1]  # by layer, of the last token
        lens.to_pandas()  # a row for each layer and token

    Attributes:
        prompt_set, prompt_id, sample: the capture; `name` is that of its files.
        tokens: texts of all tokens, prompt first.
        n_prompt_tokens: how many of them belong to the prompt.
        top_tokens: `[layer][prediction][k]`, texts of the most likely next tokens, most likely first.
        top_probs: `[n_layers, n_predictions, k]`, their probabilities.
        actual_rank: `[n_layers, n_predictions]`, the rank of the actual next token; 1 is the most likely.
        actual_prob: `[n_layers, n_predictions]`, its probability.
        source: a file name, or `its residuals` for stored residuals and the model's unembedding.
        positions: the tokens that were kept; `None` means all.
        layers: the layers that were kept, in the order of the rows; `None` means all.

    Raises `StorageError` if the shapes do not match the tokens.
    """

    prompt_set: str
    prompt_id: PromptId
    tokens: Sequence[str]
    n_prompt_tokens: int
    top_tokens: Sequence[Sequence[Sequence[str]]] = field(repr=False)
    top_probs: NDArray[np.float64] = field(repr=False)
    actual_rank: NDArray[np.int64] = field(repr=False)
    actual_prob: NDArray[np.float64] = field(repr=False)
    source: str
    positions: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    sample: int | None = None

    def __post_init__(self) -> None:
        shape = (len(self.top_tokens), self.n_predictions)
        if not self.top_probs.shape[:2] == self.actual_rank.shape == self.actual_prob.shape == shape:
            raise StorageError(f"predictions of shape {list(self.top_probs.shape)} for {len(self.tokens)} tokens")

    @property
    def name(self) -> PromptId:
        """The capture's name within its set: `7`, or `7.s1` for a sample."""
        return capture_name(self.prompt_id, self.sample)

    @property
    def n_layers(self) -> int:
        """Number of layers whose predictions were kept: all of the model's, unless `layers` names some."""
        return len(self.top_probs)

    @property
    def layer_numbers(self) -> Sequence[int]:
        """The layer of each row."""
        return range(self.n_layers) if self.layers is None else self.layers

    @property
    def n_predictions(self) -> int:
        """Number of kept tokens that have a next token."""
        return len(self.after)

    @property
    def after(self) -> Sequence[int]:
        """The token that each prediction is made after."""
        last = len(self.tokens) - 1
        return range(last) if self.positions is None else [each for each in self.positions if each < last]

    def described(self, layer: int, column: int) -> list[str]:
        """Lines that list one prediction of a layer, and the rank of the actual next token.

        Example:
            lens.described(12, 0)  # lines of text
        """
        top = zip(self.top_tokens[layer][column][:_MOST_LISTED], self.top_probs[layer, column], strict=False)
        lines = [f"{prob:.4g} {printable(text)!r}" for text, prob in top]
        rank, prob = self.actual_rank[layer, column], self.actual_prob[layer, column]
        following = printable(self.tokens[self.after[column] + 1])
        return [*lines, f"actual next token: {following!r}, rank {rank}, {prob:.4g}"]

    def to_pandas(self) -> DataFrame:
        """The likeliest next token and the actual one, as a data frame: a row for each layer and token.

            frame = lens.to_pandas()
            frame.pivot(index="layer", columns="token_idx", values="actual_rank")

        Frames can be put together: `pandas.concat(each.logit_lens().to_pandas() for each in captures)`.
        Columns are `prompt_id`, `sample` (missing for the only response), `token_idx` and `token` (the token that the
        prediction is made after), `layer`, `top_token`, `top_prob`, and of the actual next token `actual_token`,
        `actual_part` (`prompt` or `response`), `actual_rank` and `actual_prob`.
        """
        from pandas import DataFrame

        after = list(self.after)
        n_rows = self.n_layers * len(after)
        parts = ["prompt" if token + 1 < self.n_prompt_tokens else "response" for token in after]
        return DataFrame(
            {
                "prompt_id": [self.prompt_id] * n_rows,
                "sample": [self.sample] * n_rows,
                "token_idx": np.tile(np.array(after, dtype=np.int64), self.n_layers),
                "token": [self.tokens[token] for token in after] * self.n_layers,
                "layer": np.repeat(np.array(self.layer_numbers, dtype=np.int64), len(after)),
                "top_token": [top[0] for row in self.top_tokens for top in row],
                "top_prob": self.top_probs[:, :, 0].ravel(),
                "actual_token": [self.tokens[token + 1] for token in after] * self.n_layers,
                "actual_part": parts * self.n_layers,
                "actual_rank": self.actual_rank.ravel(),
                "actual_prob": self.actual_prob.ravel(),
            }
        ).astype({"sample": "Int64"})

    def __repr__(self) -> str:
        ranks = self.actual_rank[-1, self._first_of_response :]
        first = f", the last layer ranks {int((ranks == 1).sum())} of {len(ranks)} response tokens first"
        return (
            f"LogitLensTable({self.prompt_set}/{self.name}, {self.n_layers} layers, {self.n_predictions} "
            f"predictions{first if len(ranks) else ''}, from {self.source})"
        )

    def _repr_html_(self) -> str:
        """A table of the most likely next tokens, layers down and tokens across; only a part for long captures."""
        columns = self._columns()
        head = "".join(f"<th>{escape(printable(self.tokens[self.after[column]]))}</th>" for column in columns)
        rows = "".join(
            f"<tr><th>{self.layer_numbers[row]}</th>{''.join(self._cell(row, column) for column in columns)}</tr>"
            for row in reversed(range(self.n_layers))
        )
        shown = [self.after[column] for column in columns]
        whole = len(columns) == len(self.tokens) - 1 or not shown
        part = "" if whole else f"; tokens {shown[0]} to {shown[-1]} of {len(self.tokens)}"
        caption = f"{self.prompt_set}/{self.name}: most likely next token by layer{part}"
        return (
            f'<div class="tlcapture-lens" style="overflow-x:auto"><div style="opacity:0.7">{escape(caption)}</div>'
            f'<table style="font-family:monospace;font-size:80%;white-space:pre"><tr><th>layer</th>{head}</tr>{rows}'
            "</table></div>"
        )

    def _columns(self) -> range:
        """The predictions to show: all, or in long captures those of the response."""
        if self.n_predictions <= _MOST_COLUMNS:
            return range(self.n_predictions)
        start = max(0, min(self._first_of_response, self.n_predictions - _MOST_COLUMNS))
        return range(start, start + _MOST_COLUMNS)

    @property
    def _first_of_response(self) -> int:
        """The prediction of the first token of the response, or of a later one."""
        return sum(token < self.n_prompt_tokens - 1 for token in self.after)

    def _cell(self, layer: int, column: int) -> str:
        title = escape("\n".join(self.described(layer, column)))
        colour = f"background:rgba(31,119,180,{0.7 * float(self.top_probs[layer, column, 0]):.3f})"
        likeliest = escape(printable(self.top_tokens[layer][column][0]))
        return f'<td title="{title}" style="{colour}">{likeliest}</td>'


def table_of(saved: SavedLens, labels: Mapping[str, Any]) -> LogitLensTable:
    """The table of a logit-lens file of either form, `labels` being its capture's.

    Raises `StorageError` if the file is damaged.
    """
    head, numbers = saved.head, saved.numbers()
    return LogitLensTable(
        **labels,
        top_tokens=numbers.top_tokens,
        top_probs=numbers.top_probs,
        actual_rank=numbers.actual_rank,
        actual_prob=numbers.actual_prob,
        source=saved.path.name,
        positions=head.positions_held.stated,
        layers=head.layers,
    )


def table_of_view(
    lens: LogitLens, tokenizer: Any, positions: tuple[int, ...] | None, labels: Mapping[str, Any]
) -> LogitLensTable:
    """The table of a logit lens; `labels` are its capture's."""
    from tlcapture.prompts.tokenization import token_texts

    unique = lens.top_ids.unique().tolist()
    texts = dict(zip(unique, token_texts(tokenizer, unique), strict=True))
    return LogitLensTable(
        **labels,
        top_tokens=[[[texts[i] for i in cell] for cell in row] for row in lens.top_ids.tolist()],
        top_probs=lens.top_probs.double().numpy(),
        actual_rank=lens.actual_rank.numpy(),
        actual_prob=lens.actual_prob.double().numpy(),
        source="its residuals",
        positions=positions,
    )
