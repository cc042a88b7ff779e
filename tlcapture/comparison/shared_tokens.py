"""The tokens that two captures have in common, and whether they can be compared at all."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten

from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.prompts.conversations import without_system
from tlcapture.text import n_shared
from tlcapture.views.kept_tokens import Positions


@dataclass(frozen=True)
class SharedTokens:
    """The tokens that two captures, `a` and `b`, both begin with.

    Attributes:
        held: those of them whose activations both captures hold; `n_prompt` belong to the prompt of `a`.
        rows_a, rows_b: the rows of `held` in the activations of each capture.
    """

    held: Positions
    rows_a: list[int]
    rows_b: list[int]


def shared_tokens(a: Capture, b: Capture) -> SharedTokens:
    """The tokens that two captures share, from the first on.

    Raises `InputError` for captures of different prompts (the system prompt apart), of models of other sizes or
    tokenizers, and for captures that share no token.
    """
    _check_prompts(a, b)
    _check_sizes(a, b)
    _check_tokenizers(a, b)
    n_tokens = n_shared(a.token_ids, b.token_ids)
    if not n_tokens:
        raise InputError(
            f"their first tokens differ, {a.tokens[0]!r} and {b.tokens[0]!r}: expected captures of the same prompt"
        )
    both = {*a.positions.kept} & {*b.positions.kept}
    held = Positions.of(sorted(both & {*range(n_tokens)}), min(len(a.prompt.tokens), n_tokens), n_tokens)
    if not held.kept:
        raise InputError(
            f"no shared token has activations in both: in one {a.positions.described()}, in the other "
            f"{b.positions.described()}"
        )
    rows_a, rows_b = (held.rows_in(each.positions) or list(range(len(held.kept))) for each in (a, b))
    return SharedTokens(held, rows_a, rows_b)


def _check_prompts(a: Capture, b: Capture) -> None:
    text_a, text_b = (each.metadata.get("prompt_text") for each in (a, b))
    turns_a, turns_b = (each.metadata.get("messages") for each in (a, b))
    if text_a is None or text_b is None:
        return
    if text_a != text_b:
        raise InputError(
            f"their prompts differ, {_shortened(text_a)!r} and {_shortened(text_b)!r}: expected captures of the same "
            "prompt"
        )
    if turns_a and turns_b and without_system(turns_a) != without_system(turns_b):
        raise InputError("their conversations differ: expected captures of the same messages")


def _shortened(text: str) -> str:
    return shorten(text, 60, placeholder="...")


def _check_sizes(a: Capture, b: Capture) -> None:
    if (a.n_layers, a.d_model) != (b.n_layers, b.d_model):
        raise InputError(
            f"the models have {a.n_layers} layers of width {a.d_model} and {b.n_layers} of width {b.d_model}: expected "
            "two models of the same shape"
        )


def _check_tokenizers(a: Capture, b: Capture) -> None:
    texts = dict(zip(a.token_ids, a.tokens, strict=True))
    for token_id, text in zip(b.token_ids, b.tokens, strict=True):
        if texts.get(token_id, text) != text:
            raise InputError(
                f"the models have different tokenizers: token {token_id} is {texts[token_id]!r} in one and {text!r} in "
                "the other"
            )
    if a.prompt.text == b.prompt.text and a.prompt.token_ids != b.prompt.token_ids:
        raise InputError(
            "the models have different tokenizers: the same text has "
            f"{len(a.prompt.token_ids)} tokens in one and {len(b.prompt.token_ids)} in the other, or other ids"
        )
