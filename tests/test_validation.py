"""Problems of a file's content in plain words: field, what was expected, what was found."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from tlcapture.errors import InputError, StorageError
from tlcapture.names import PromptId
from tlcapture.storage.validation import Count, FileContent, Layer, Number, Share, first_problem, of_form


class Row(FileContent):
    name: str = "x"
    n: Count = 0
    share: Share = 0.5
    score: Number = 0.0
    is_new: bool = False
    prompt_id: PromptId = 1
    kind: Literal["turn", "answer"] = "turn"
    layers: Annotated[list[Layer] | None, Field(min_length=1)] = None
    by_layer: dict[Layer, str] | None = None
    inner: Row | None = None


class Table(FileContent):
    rows: list[Row]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"name": 5}, "rows[0].name: expected a text, found 5"),
        ({"name": None}, "rows[0].name: expected a text, found null"),
        ({"n": "3"}, "rows[0].n: expected a whole number, found '3'"),
        ({"n": 3.5}, "rows[0].n: expected a whole number, found 3.5"),
        ({"n": -1}, "rows[0].n: expected a number of at least 0, found -1"),
        ({"share": 2}, "rows[0].share: expected a number of at most 1, found 2"),
        ({"score": float("nan")}, "rows[0].score: expected a finite number, found nan"),
        ({"score": []}, "rows[0].score: expected a number, found an empty list"),
        ({"is_new": "yes"}, "rows[0].is_new: expected true or false, found 'yes'"),
        ({"prompt_id": 1.5}, "rows[0].prompt_id: expected a whole number or a text, found 1.5"),
        ({"kind": "other"}, "rows[0].kind: expected 'turn' or 'answer', found 'other'"),
        ({"layers": []}, "rows[0].layers: expected at least 1 entry, found an empty list"),
        ({"layers": {}}, "rows[0].layers: expected a list, found an object"),
        ({"layers": [10_000]}, "rows[0].layers[0]: expected a number below 10000, found 10000"),
        ({"by_layer": {"a": "b"}}, "rows[0].by_layer.a: expected a whole number as its name, found 'a'"),
        ({"inner": [1, 2]}, "rows[0].inner: expected an object, found a list of 2 entries"),
        ({"name": "a\n\x1b" * 100, "n": []}, "rows[0].n: expected a whole number, found an empty list"),
        ({"n": "y" * 1000}, f"rows[0].n: expected a whole number, found '{'y' * 60}'..."),
        ({"n": 10**5000 * -1}, "rows[0].n: expected a number of at least 0, found a number of more than 64 bits"),
        ({"n": "x", "name": 1, "share": 3}, "rows[0].name: expected a text, found 1 (and 2 more)"),
    ],
)
def test_a_problem_is_field_expected_and_found(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Table.model_validate({"rows": [row]})
    assert first_problem(caught.value) == says


@pytest.mark.parametrize(
    ("content", "says"),
    [([], "expected an object, found an empty list"), ({}, "rows: expected, but missing")],
)
def test_a_problem_of_the_whole_file_has_no_field(content: Any, says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Table.model_validate(content)
    assert first_problem(caught.value) == says


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "it lacks 'rows'"),
        ({"rows": 3}, "a value in it has another form than expected"),
        ({"rows": [{"name": 5}]}, "name: expected a text, found 5"),
        ({"rows": [{"n": "x"}]}, "n: expected a whole number, found 'x'"),
    ],
)
def test_content_of_another_form_is_told_without_words_of_python(value: Any, says: str) -> None:
    with pytest.raises(StorageError) as caught, of_form("a.json", "table"):
        [Row.model_validate(row) for row in value["rows"]]
    assert str(caught.value) == f"a.json: not a valid table: {says}"


def test_an_error_that_is_not_about_the_content_is_kept() -> None:
    with pytest.raises(PermissionError), of_form("a.json", "table"):
        raise PermissionError(13, "Permission denied", "b.json")
    with pytest.raises(InputError, match="no such set"), of_form("a.json", "table"):
        raise InputError("no such set")
