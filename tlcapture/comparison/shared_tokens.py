"""The tokens that two captures have in common, and whether they can be compared at all."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten

from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.prompts.conversations import without_system
from tlcapture.views.kept_tokens import Positions


@dataclass(frozen=True)
class SharedTokens:
    """The tokens that two captures, `a` and `b`, both begin with.

    Attributes:
        n_tokens: how many there are.
        n_prompt: how many of them belong to the prompt of `a`.
        held: the shared tokens whose activations both captures hold.
        rows_a, rows_b: the rows of `held` in the activations of each capture.
    """

    n_tokens: int
    n_prompt: int
    held: tuple[int, ...]
    rows_a: list[int]
    rows_b: list[int]

    @property
    def response(self) -> range:
        """The response's shared tokens; if there are none, the prompt's except the first, an attention sink."""
        return range(self.n_prompt, self.n_tokens) if self.n_tokens > self.n_prompt else range(1, self.n_tokens)


def shared_tokens(a: Capture, b: Capture) -> SharedTokens:
    """The tokens that two captures share, from the first on.

    Raises `InputError` for captures of different prompts (the system prompt apart), of models of other sizes or
    tokenizers, and for captures that share no token.
    """
    _check_prompts(a, b)
    _check_sizes(a, b)
    _check_tokenizers(a, b)
    pairs = zip(a.token_ids, b.token_ids, strict=False)
    shorter = min(len(a.token_ids), len(b.token_ids))
    n_tokens = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
    if not n_tokens:
        raise InputError(
            f"their first tokens differ, {a.tokens[0]!r} and {b.tokens[0]!r}: expected captures of the same prompt"
        )
    both = {*a.positions.kept} & {*b.positions.kept}
    held = tuple(index for index in range(n_tokens) if index in both)
    if not held:
        raise InputError(
            f"no shared token has activations in both: {a.positions.described()} and those of the other "
            f"are {b.positions.described()}"
        )
    chosen = Positions(held, min(len(a.prompt.tokens), n_tokens), max(len(a.tokens), len(b.tokens)))
    rows_a, rows_b = (chosen.rows_in(each.positions) or list(range(len(held))) for each in (a, b))
    return SharedTokens(n_tokens, chosen.n_prompt, held, rows_a, rows_b)


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
