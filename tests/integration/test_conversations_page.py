"""The examples of docs/conversations.md run, and print what the page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tlcapture.prompts.prompt_sets import read_prompt_file

PAGE = (Path(__file__).parents[2] / "docs" / "conversations.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_the_example_prints_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, smollm2: Any
) -> None:
    monkeypatch.setattr("tlcapture.load_model", lambda name: smollm2)
    exec(block("python"), {})
    assert capsys.readouterr().out == block("text")


def test_the_prompt_set_of_the_page_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    path.write_text(block("json"))
    found = read_prompt_file(path)
    assert found.prompts[1].text == "And lakes?"
    assert list(found.prompts[1].messages) == json.loads(block("json"))["prompts"][1]["messages"]
