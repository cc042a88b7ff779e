"""Reading prompt sets: invalid files raise an error that names file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tlcapture.errors import InputError
from tlcapture.prompts.prompt_sets import PromptSet, read_prompt_set
from tlcapture.storage.layout import Datasets

VALID = {"name": "mine", "description": "d", "prompts": [{"id": "1", "text": "hello", "note": "n"}]}


def read(root: Path, content: Any) -> PromptSet:
    folder = root / "datasets" / "inference"
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "mine.json").write_text(text, encoding="utf-8")
    return read_prompt_set(Datasets(root), "mine")


def with_prompts(*prompts: Any) -> dict[str, Any]:
    return {**VALID, "prompts": list(prompts)}


def test_a_valid_set_is_read(tmp_path: Path) -> None:
    prompt_set = read(tmp_path, VALID)
    assert [(prompt.id, prompt.text) for prompt in prompt_set.prompts] == [("1", "hello")]


def test_integer_ids_become_strings(tmp_path: Path) -> None:
    assert read(tmp_path, with_prompts({"id": 7, "text": "x"})).prompts[0].id == "7"


def test_the_most_specific_system_prompt_wins(tmp_path: Path) -> None:
    content = with_prompts({"id": "1", "text": "x", "system_prompt": "own"}, {"id": "2", "text": "y"})
    prompt_set = read(tmp_path, content)
    first, second = prompt_set.prompts
    assert prompt_set.system_prompt_of(second, "experiment") == "experiment"
    of_set = read(tmp_path, {**content, "system_prompt": "set"})
    assert of_set.system_prompt_of(first, "experiment") == "own"
    assert of_set.system_prompt_of(second, "experiment") == "set"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"name": "mine",\n "prompts": [}', "line 2, column 14: not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 5000, "not valid JSON"),
        ([], "the whole file: "),
        ({"name": "mine"}, "prompts: Field required"),
        (with_prompts(), "prompts: "),
        (with_prompts({"id": "1"}), "prompts[0].text: Field required"),
        (with_prompts({"id": "1", "text": " \n"}), "prompts[0].text: text is empty"),
        (with_prompts({"id": "1", "text": "a"}, {"id": "1", "text": "b"}), "id '1' occurs twice"),
        (with_prompts({"id": "a", "text": "a"}, {"id": "A", "text": "b"}), "id 'A' occurs twice"),
        (with_prompts({"id": "../x", "text": "a"}), "prompts[0].id: id '../x' is not a safe file name"),
        (with_prompts({"id": "-x", "text": "a"}), "not a safe file name"),
        (with_prompts({"id": "a\0", "text": "a"}), "not a safe file name"),
        (with_prompts({"id": True, "text": "a"}), "prompts[0].id"),
        (with_prompts({"id": "1", "text": 5}), "prompts[0].text"),
        (with_prompts({"id": "1", "text": "a", "txt": "b"}), "prompts[0].txt: Extra inputs"),
        ({**VALID, "name": "other"}, "name: expected 'mine'"),
    ],
)
def test_an_invalid_set_is_refused_with_file_and_field(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert expected in message
    assert "mine.json" in message
    assert "\n" not in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    read(tmp_path, VALID)
    (tmp_path / "datasets" / "inference" / "mine.json").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(InputError, match=r"mine\.json"):
        read_prompt_set(Datasets(tmp_path), "mine")


def test_the_error_for_a_missing_set_lists_the_existing_ones(tmp_path: Path) -> None:
    read(tmp_path, VALID)
    with pytest.raises(
        InputError, match=r"no prompt set 'nix'.*existing sets: adversarial, baseline.*mine.*single_trait"
    ):
        read_prompt_set(Datasets(tmp_path), "nix")


def test_a_set_in_the_root_wins_over_the_packaged_one(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "inference"
    folder.mkdir(parents=True)
    (folder / "baseline.json").write_text(json.dumps({**VALID, "name": "baseline"}))
    assert len(read_prompt_set(Datasets(tmp_path), "baseline").prompts) == 1


PACKAGED = {"single_trait": 10, "multi_trait": 10, "dynamic": 8, "adversarial": 8, "baseline": 5, "real_world": 10}


@pytest.mark.parametrize(("name", "count"), PACKAGED.items())
def test_packaged_sets_are_complete_and_every_prompt_has_a_note(tmp_path: Path, name: str, count: int) -> None:
    prompt_set = read_prompt_set(Datasets(tmp_path), name)
    assert len(prompt_set.prompts) == count
    assert len({prompt.text for prompt in prompt_set.prompts}) == count
    assert all(prompt.note for prompt in prompt_set.prompts)
