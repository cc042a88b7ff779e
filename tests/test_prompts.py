"""Reading prompt sets: invalid files raise an error that names file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tlcapture.errors import InputError
from tlcapture.prompts.prompt_sets import Prompt, PromptSet, read_all_prompt_sets, read_prompt_set
from tlcapture.storage.experiments.datasets import Datasets

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


def test_an_id_keeps_its_type(tmp_path: Path) -> None:
    prompts = read(tmp_path, with_prompts({"id": 7, "text": "x"}, {"id": "8", "text": "y"})).prompts
    assert [prompt.id for prompt in prompts] == [7, "8"]


def test_a_name_is_a_title_and_further_keys_are_kept(tmp_path: Path) -> None:
    content = {
        "name": "My best prompts",
        "version": 3,
        "prompts": [{"id": 1, "prompt": "x", "label": {"a": [1, None]}}],
    }
    found = read(tmp_path, content)
    assert (found.name, found.title) == ("mine", "My best prompts")
    assert (found.prompts[0].text, found.prompts[0].fields) == ("x", {"label": {"a": [1, None]}})
    assert found.model_extra == {"version": 3}


def test_further_keys_given_in_python_are_plain_values_or_refused() -> None:
    prompt = Prompt(id=1, text="a", n=np.int64(2), x=np.float64(0.5), s=np.str_("t"), row={"at": (np.arange(2), None)})
    assert prompt.fields == {"n": 2, "x": 0.5, "s": "t", "row": {"at": [[0, 1], None]}}
    assert [type(each) for each in prompt.fields.values()] == [int, float, str, dict]
    with pytest.raises(ValidationError, match="when: expected a JSON value, which metadata can hold, found a date"):
        Prompt(id=1, text="a", when=np.datetime64("2020-01-01"))


def test_a_bare_list_is_a_set(tmp_path: Path) -> None:
    found = read(tmp_path, [{"id": "a", "prompt": "one"}, {"id": 2, "text": "two", "note": "n"}])
    assert (found.name, found.title) == ("mine", "mine")
    assert [(prompt.id, prompt.text, prompt.fields) for prompt in found.prompts] == [("a", "one", {}), (2, "two", {})]


def test_a_set_in_a_subfolder_is_found_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "inference" / "general" / "deep"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text(json.dumps([{"id": 1, "text": "x"}]))
    (folder / "a b.json").write_text(json.dumps([{"id": 1, "text": "x"}]))
    (folder / ".hidden.json").write_text("{}")
    (folder.parent / ".ipynb_checkpoints").mkdir()
    (folder.parent / ".ipynb_checkpoints" / "x.json").write_text("{}")
    datasets = Datasets(tmp_path)
    assert set(datasets.prompt_sets()) == {*PACKAGED, "general/deep/mine"}
    assert read_prompt_set(datasets, "general/deep/mine").name == "general/deep/mine"
    sets, refused = read_all_prompt_sets(datasets)
    assert {each.name for each in sets} == set(datasets.prompt_sets())
    ((name, reason),) = refused
    assert name == "general/deep/a b"
    assert "is not a safe file name" in reason


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a//b", "a/", "/", "", ".", "a/../b", "a/.b", "a/-b", "a\\b", "x/" * 64 + "x", "a/" + "x" * 128],
)
def test_a_name_cannot_leave_the_folder_of_prompt_sets(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a safe file name"):
        read_prompt_set(Datasets(tmp_path), name)


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
        ([], "prompts: expected at least 1 entry, found an empty list"),
        (5, 'expected a list of prompts, or {"prompts": [...]}'),
        (["hello"], "prompts[0]: "),
        ([{"prompt": "x"}], "prompts[0].id: expected, but missing"),
        ([{"id": 1, "prompt": "x", "text": "y"}], "prompts[0]: both text and prompt: leave out one of them"),
        ([{"id": 1, "messages": []}], "prompts[0]: messages: expected at least one"),
        ([{"id": 1, "text": "x"}, {"id": "1", "text": "y"}], "ids 1 and '1' would have the same files"),
        ([{"id": 1.5, "text": "x"}], "prompts[0].id: id 1.5: expected a text or a whole number"),
        ([{"id": 1.0, "text": "x"}], "prompts[0].id: id 1.0: expected a text or a whole number"),
        ([{"id": None, "text": "x"}], "prompts[0].id: id None: expected a text or a whole number"),
        ([{"id": -1, "text": "x"}], "prompts[0].id: id -1 is not a safe file name"),
        ([{"id": 2**53, "text": "x"}], "above 9007199254740991: write it as a text"),
        ([{"id": 10**30, "text": "x"}], "100000000000000000000000000000... has more than 64 bits: write it as a text"),
        ({"name": "mine"}, 'expected a list of prompts, or {"prompts": [...]}'),
        (with_prompts(), "prompts: "),
        (with_prompts({"id": "1"}), "prompts[0].text: expected, but missing"),
        (with_prompts({"id": "1", "text": " \n"}), "prompts[0].text: text is empty"),
        (with_prompts({"id": "1", "text": "a"}, {"id": "1", "text": "b"}), "id '1' occurs twice"),
        (with_prompts({"id": "a", "text": "a"}, {"id": "A", "text": "b"}), "ids 'a' and 'A' would have the same files"),
        (with_prompts({"id": "../x", "text": "a"}), "prompts[0].id: id '../x' is not a safe file name"),
        (with_prompts({"id": "-x", "text": "a"}), "not a safe file name"),
        (with_prompts({"id": "a\0", "text": "a"}), "not a safe file name"),
        (with_prompts({"id": True, "text": "a"}), "prompts[0].id"),
        (with_prompts({"id": "1", "text": 5}), "prompts[0].text"),
        ({**VALID, "name": 5}, "name: expected a text"),
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
