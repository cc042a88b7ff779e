"""Single entries of large files equal those of the parsed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import InputError, StorageError
from tlcapture.views.token_entries import TokenEntries

TEXTS = st.text(max_size=12) | st.sampled_from(['{"token_idx": 5', '{"token_idx":7,', '"},{', "]}", "\\"])
ENTRIES = st.lists(st.lists(st.tuples(TEXTS, st.floats(allow_nan=False, allow_infinity=False)), max_size=3), max_size=5)


@given(texts=st.lists(TEXTS, max_size=4), entries=ENTRIES, spaced=st.booleans(), last=st.booleans())
def test_entries_and_the_rest_equal_those_of_the_parsed_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], entries: list[Any], spaced: bool, last: bool
) -> None:
    listed = [{"token_idx": number, "by_layer": each} for number, each in enumerate(entries)]
    content: dict[str, Any] = {"tokens": texts, "predictions": listed, **({"top_k": 50} if last else {})}
    path = tmp_path_factory.mktemp("entries") / "1.json"
    separators = None if spaced else (",", ":")
    path.write_text(json.dumps(content, separators=separators, ensure_ascii=spaced), encoding="utf-8")
    found, whole = TokenEntries(path), json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == whole["predictions"]
    assert found.token_indices == [entry["token_idx"] for entry in listed]
    assert found.rest == {**whole, "predictions": []}
    for entry in whole["predictions"]:
        assert found[entry["token_idx"]] == entry


def test_a_missing_token_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "1_attention.json"
    path.write_text('{"attention": [{"token_idx": 0, "by_layer": []}]}')
    with pytest.raises(InputError, match=r"1_attention\.json has no token 3"):
        TokenEntries(path)[3]


@pytest.mark.parametrize(
    "content", ["", '{"attention": [{"token_idx": 0, "by', '{"token_idx": 0}x{', "[1, 2]", "{not json"]
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "1.json"
    path.write_text(content)
    with pytest.raises(StorageError, match=r"1\.json"):
        print(TokenEntries(path).rest)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    path.write_text('{"attention": [{"token_idx": 0, "x": 1}]}')
    assert TokenEntries(path)[0]["x"] == 1
    path.write_text('{"attention": [{"token_idx": 0, "x": 1}, {"token_idx": 1, "x": 2}]}')
    assert TokenEntries(path)[1]["x"] == 2
