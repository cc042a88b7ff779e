"""Joined tokens: whatever bytes characters were split into, groups read as the text does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_many_prompts import FEW, MANY, is_linear
from tlcapture.page.readable import joined
from tlcapture.text import REPLACEMENT as PART

TEXTS = st.text(st.sampled_from("ab ,\nשלוםךמה東京にいо́éüñ🎉👨\u200d👩🏽हि"), min_size=1, max_size=14)


def decoded(text: str, borders: list[int]) -> list[str]:
    """The tokens of a byte-level tokenizer that splits the text's bytes at these borders."""
    data = text.encode()
    places = sorted({0, len(data), *(border % len(data) for border in borders)})
    return [data[start:stop].decode(errors="replace") for start, stop in pairwise(places)]


def read(tokens: list[str], text: str) -> str:
    starts = {group["start"]: group for group in joined(tokens, text)}
    shown, at = "", 0
    while at < len(tokens):
        shown += starts[at]["text"] if at in starts else tokens[at]
        at = starts[at]["stop"] if at in starts else at + 1
    return shown


@given(text=TEXTS, borders=st.lists(st.integers(0, 200), max_size=30))
def test_tokens_read_as_the_text_does_wherever_bytes_are_split(text: str, borders: list[int]) -> None:
    assert read(decoded(text, borders), text) == text


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        (["א", "י�", "�", " �", "�", "ל", "<|im_end|>"], "איך של", [(1, 3, "יך"), (3, 5, " ש")]),
        (["I", " �", "�", "�", "!"], "I 🎉!", [(1, 4, " 🎉")]),
        (["�", "�", "�", "�", "に"], "東京に", [(0, 2, "東"), (2, 4, "京")]),
        (["�", "�", "�", "�", "�", "に"], "東京に", [(0, 5, "東京")]),
        (["ו", "�", "�", "?", "<|im_end|>"], "ום?", [(1, 3, "ם")]),
        (["<s>", "�", "�", "<e>", "x"], "שx", [(1, 3, "ש")]),
        (["e", "\u0301", "!"], "e\u0301!", [(0, 2, "e\u0301")]),
        (["a", PART, "b"], "a" + PART + "b", []),
        (["plain", " text"], "plain text", []),
        (["x", "�", "�"], "another text", []),
    ],
)
def test_only_bytes_of_one_character_are_joined(tokens: list[str], text: str, expected: list[object]) -> None:
    assert [(each["start"], each["stop"], each["text"]) for each in joined(tokens, text)] == expected


@pytest.mark.parametrize("word", ["🎉 ", "中"])
def test_thousands_of_bytes_in_a_row_take_calls_in_proportion(word: str) -> None:
    def work(count: int) -> Callable[[], None]:
        text = word * count
        borders = [at for at in range(1, len(text.encode())) if text.encode()[at - 1 : at] != b" "]
        tokens = decoded(text, borders)  # a space is in one token with the byte after it
        return lambda: found.append(joined(["x", *tokens, "<|end|>"], f"x{text}"))

    found: list[Any] = []
    assert is_linear(work)
    assert [len(each) for each in found] == [1, 1, FEW, MANY]
