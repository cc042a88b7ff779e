"""Coloured tokens, for a notebook and for a terminal: by their projection onto a trait, or by part.

    ColouredTokens(cap.tokens, len(cap.prompt.tokens), scores, "behavioral/refusal, layer 16")

The scale is symmetric about 0, red above and blue below, and ends at the largest `|score|`. The first token
is left out of it: it is an attention sink, whose projection can be a hundred times that of other tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tlcapture.text import NEWLINE, printable

_STRONGEST = 0.7  # opacity at the end of the scale: text stays readable on light and dark pages
_RED, _BLUE = "214,39,40", "31,119,180"
_PROMPT, _RESPONSE = "rgba(127,127,127,0.18)", "rgba(44,160,44,0.22)"
_SINK = "outline:1px dashed rgba(127,127,127,0.9)"
# From pale to strong, among the 256 colours that all terminals have.
_REDS, _BLUES = (231, 224, 217, 210, 203), (231, 189, 153, 117, 75)
_RESET, _DIM, _GREEN = "\x1b[0m", "\x1b[2m", "\x1b[32m"


Label = tuple[str | None, str | None]
# By the kind of a token: its background in HTML, and its colour in a terminal.
_BY_SPAN = {
    "template": ("transparent", _DIM),
    "system": ("rgba(148,103,189,0.22)", "\x1b[35m"),
    "user": ("rgba(31,119,180,0.22)", "\x1b[34m"),
    "assistant": ("rgba(23,190,207,0.22)", "\x1b[36m"),
    "tool": ("rgba(140,86,75,0.22)", "\x1b[31m"),
    "thinking": ("rgba(255,187,0,0.26)", "\x1b[33m"),
    "answer": (_RESPONSE, _GREEN),
}


def _name_of(label: Label) -> str | None:
    """The name of a token's kind: the role of its turn, or `thinking`, `answer` or `template`."""
    kind, role = label
    name = role if kind == "turn" else kind
    return name if name in _BY_SPAN else None


def _shown(token: str) -> str:
    return printable(token).replace(NEWLINE, f"{NEWLINE}\n") if "\n" in token else printable(token)


def scale_of(scores: Sequence[float | None]) -> float:
    """The largest `|score|` after the first token; 1 if there are no others, or all are 0."""
    return max((abs(score) for score in scores[1:] if score is not None), default=0.0) or 1.0


@dataclass(frozen=True, eq=False, repr=False)
class ColouredTokens:
    """The tokens of a prompt and its response as one sequence, to be displayed in colour.

        cap.coloured("behavioral/refusal")

    Attributes:
        scores: one score per token, `None` for those without one; or `None` to colour by part alone.
        label: what the scores are, for the caption and for the tooltip of a token.
        spans: kind and role of the span of each token, where spans are known; without scores, they give the colours.
    """

    tokens: Sequence[str]
    n_prompt_tokens: int
    scores: Sequence[float | None] | None = None
    label: str = ""
    spans: Sequence[Label] = ()

    def __post_init__(self) -> None:
        if self.scores is not None and len(self.scores) != len(self.tokens):
            raise ValueError(f"{len(self.scores)} scores for {len(self.tokens)} tokens")
        if self.spans and len(self.spans) != len(self.tokens):
            raise ValueError(f"{len(self.spans)} labels of spans for {len(self.tokens)} tokens")
        if self.scores is not None and not all(score is None or math.isfinite(score) for score in self.scores):
            raise ValueError("a score is NaN or inf")

    def __repr__(self) -> str:
        """The text on one line, without colour."""
        caption = f" {self._caption()}" if self._caption() else ""
        return f"<{len(self.tokens)} tokens{caption}: {printable(''.join(self.tokens))!r}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The display in IPython: in colour if it writes to a terminal."""
        printer.text(self.ansi() if sys.stdout.isatty() else repr(self))

    def _repr_html_(self) -> str:
        spans = "".join(self._span(index) for index in range(len(self.tokens)))
        caption = f'<div style="opacity:0.7;font-size:90%">{escape(self._caption())}</div>' if self._caption() else ""
        style = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6"
        return f'<div class="tlcapture-tokens">{caption}<div style="{style}">{spans}</div></div>'

    def ansi(self, *, caption: bool = True) -> str:
        """The text with a terminal's colours; each newline is shown as a symbol and starts a new line.

        Example:
            print(cap.coloured("behavioral/refusal").ansi())
        """
        pieces = [f"{self._ansi_colour(index)}{_shown(token)}{_RESET}" for index, token in enumerate(self.tokens)]
        above = f"{self._caption()}\n" if caption and self._caption() else ""
        return above + "".join(pieces)

    def _caption(self) -> str:
        if self.scores is None:
            names = dict.fromkeys(name for label in self.spans if (name := _name_of(label)) is not None)
            return ": ".join(filter(None, (self.label, ", ".join(names)))) if self.spans else self.label
        scale = f"{scale_of(self.scores):.4g}"
        return f"{self.label}: blue \u2212{scale} to red +{scale}, the first token left out of the scale".lstrip(": ")

    def _strength(self, index: int) -> float:
        """A token's score as a share of the scale, from -1 to 1; 0 without a score."""
        assert self.scores is not None
        return max(-1.0, min(1.0, (self.scores[index] or 0.0) / scale_of(self.scores)))

    def _span(self, index: int) -> str:
        token = escape(_shown(self.tokens[index]))
        return f'<span title="{escape(self._title(index))}" style="{self._style(index)}">{token}</span>'

    def _style(self, index: int) -> str:
        if self.scores is None:
            return f"background:{self._colours(index)[0]}"
        if index == 0:
            return _SINK
        strength = self._strength(index)
        edge = ";border-left:2px solid" if index == self.n_prompt_tokens else ""
        return f"background:rgba({_RED if strength > 0 else _BLUE},{abs(strength) * _STRONGEST:.3f}){edge}"

    def _title(self, index: int) -> str:
        part = "prompt" if index < self.n_prompt_tokens else "response"
        if self.spans and (name := _name_of(self.spans[index])) is not None:
            part = f"{part}, {name}"
        title = f"{index} {part} {printable(self.tokens[index])!r}"
        if self.scores is None:
            return title
        score = self.scores[index]
        if score is None:
            return f"{title}\n{self.label}: not kept"
        note = " (attention sink: left out of the scale)" if index == 0 else ""
        return f"{title}\n{self.label} {score:+.4g}{note}"

    def _colours(self, index: int) -> tuple[str, str]:
        """The background of a token in HTML and its colour in a terminal, by span, or by part where there is none."""
        if self.spans and (name := _name_of(self.spans[index])) is not None:
            return _BY_SPAN[name]
        return (_PROMPT, _DIM) if index < self.n_prompt_tokens else (_RESPONSE, _GREEN)

    def _ansi_colour(self, index: int) -> str:
        if self.scores is None:
            return self._colours(index)[1]
        if index == 0:
            return _DIM
        strength = self._strength(index)
        ramp = _REDS if strength > 0 else _BLUES
        return f"\x1b[38;5;16;48;5;{ramp[round(abs(strength) * (len(ramp) - 1))]}m"
