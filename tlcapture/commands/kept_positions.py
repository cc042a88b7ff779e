"""The tokens that the outputs of a capture should hold, and whether an existing file holds them."""

from __future__ import annotations

from tlcapture.captures.capture import Capture
from tlcapture.commands.known_views import KnownView
from tlcapture.views.kept_tokens import KeptTokens, Positions, kept_of


def wanted_positions(tokens: KeptTokens | None, capture: Capture, *, fresh: bool) -> Positions:
    """The tokens that outputs of a capture should hold: the chosen ones, or without a choice those of the capture.

    Without a choice, a `fresh` capture should hold all.
    """
    if tokens is None and not fresh:
        return capture.positions
    return kept_of(tokens, len(capture.prompt.tokens), len(capture.tokens))


def lacks_positions(view: KnownView, tokens: KeptTokens | None) -> bool:
    """Whether a file lacks a token that is wanted. Without a choice, what an existing file holds is enough."""
    held = view.positions
    return tokens is not None and not held.includes(tokens.of(held.n_prompt, held.n_tokens))
