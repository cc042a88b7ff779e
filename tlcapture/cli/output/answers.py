"""The answers to prompts of the command line: the whole text, in colour by the trait that stands out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from tlcapture.cli.output.console import Console
from tlcapture.cli.output.tables import Column
from tlcapture.errors import StorageError
from tlcapture.names import split_name
from tlcapture.text import printable

if TYPE_CHECKING:
    from tlcapture.commands.projecting.top_traits import TopTrait
    from tlcapture.names import PromptId
    from tlcapture.storage.experiments.layout import Layout

MOST_SHOWN = 5


def show_answers(
    console: Console, layout: Layout, prompt_set: str, ids: Sequence[PromptId], tops: Sequence[TopTrait]
) -> None:
    """Print the answers to the first few prompts, each under a line that says what stands out.

    Of several samples, only the first if traits were projected onto, otherwise the first few.
    """
    by_id = {top.prompt_id: top for top in tops}
    for prompt_id in ids[:MOST_SHOWN]:
        top = by_id.get(str(prompt_id))
        if top is not None:
            _show(console, top)
        else:
            names = (name for name in layout.captured(prompt_set) if str(prompt_id) in (name, split_name(name)[0]))
            for name in islice(names, MOST_SHOWN):
                _show_capture(console, layout, prompt_set, name)
        console.line()


def _show_capture(console: Console, layout: Layout, prompt_set: str, name: str) -> None:
    from tlcapture.captures.capture import Capture

    console.line(f"{prompt_set}/{name}:")
    _plain(console, Capture.open(layout.residual(prompt_set, name)).response.text)


def show_without_rises(
    console: Console, layout: Layout, prompt_set: str, ids: Sequence[PromptId], *, is_projected: bool
) -> None:
    """Print a table of the answers of a set that is projected onto no trait, or whose responses are empty."""
    from tlcapture.page.captured import captured_tokens

    rows = []
    for prompt_id in ids:
        with suppress(StorageError):  # reported wherever the capture is read
            if (raw := layout.residual(prompt_set, prompt_id)).is_file():
                rows.append((str(prompt_id), captured_tokens(raw)["text"]))
    if rows:
        console.line()
        why = "no rise is known without tokens of the response" if is_projected else "projected onto no trait"
        console.line(f"{prompt_set}: {why}")
        console.line()
        console.table([Column("prompt", right=True), Column("response")], rows)
        console.line()


def _show(console: Console, top: TopTrait) -> None:
    answer = f"answer {top.prompt_id}" + ("" if top.samples is None else ", the first sample")
    if not top.stands_out:
        none = "no trait stands out from chance" if top.chance is not None else "whether a trait stands out is unknown"
        console.line(f"{answer}: {none}, so it is not coloured")
        _plain(console, top.response)
    elif not _has_colours(as_json=console.as_json):
        console.line(f"{answer}: {top.trait} stands out (a terminal shows it in colour)")
        _plain(console, top.response)
    else:
        from tlcapture.coloured_tokens import ColouredTokens

        what = (
            "as in the positive examples, blue as in the negative ones" if top.is_calibrated else "above 0, blue below"
        )
        console.line(f"{answer}: coloured by {top.trait}, which stands out: red {what}")
        pieces = top.pieces
        # The first token is left out of the scale.
        tokens = ColouredTokens(["", *(text for text, _ in pieces)], 1, [None, *(score for _, score in pieces)])
        console.coloured(tokens.ansi(caption=False))


def _plain(console: Console, text: str) -> None:
    if not text.strip():
        console.line("(no text)")
    for line in text.splitlines():
        console.line(printable(line))


def _has_colours(*, as_json: bool) -> bool:
    return (sys.stderr if as_json else sys.stdout).isatty() and not os.environ.get("NO_COLOR")
