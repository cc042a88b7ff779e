"""The overview of a prompt set: rises, what stands out, and the text of captures that are not projected."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest
import torch

from tests.input.test_capture_index import made as tiny_capture
from tests.page.conftest import N_PROMPT, TOKENS, TRAIT, projection, write
from tlcapture.page.contents import Contents

OTHER = "style/quiet"
N_DIRECTIONS = 21


def projected(root: Path, prompt: int, trait: str, slope: float, random: float = 0.0) -> list[float]:
    """Write a projection whose trajectory rises by `slope` per token; returns it."""
    content = projection(prompt)
    values = [slope * token for token in range(len(TOKENS))]
    scores = [[[value] * 3] * 3 for value in values]
    content["projections"] = {"prompt": scores[:N_PROMPT], "response": scores[N_PROMPT:]}
    content["metadata"]["vector_source"]["trait"] = trait
    content["metadata"]["chance"] = {
        "n_directions": N_DIRECTIONS, "directions": "seed 0", "commit": 0, "persist": 0, "commitment": 0.0,
        "persistence": 0.0, "rises": [random * number for number in range(N_DIRECTIONS)],
    }  # fmt: skip
    write(root / "experiments/exp/inference" / trait / f"residual_stream/odd/{prompt}.json", content)
    return values


def rise(values: list[float]) -> float:
    return mean(values[N_PROMPT:]) - mean(values[1:N_PROMPT])


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in found["rows"]}


def test_rises_are_standard_scores_over_the_set_and_stand_out_beyond_their_chance(page_root: Path) -> None:
    slopes = {TRAIT: (1.0, 2.0, 9.0), OTHER: (4.0, 3.0, 5.0)}
    raw = {
        trait: [rise(projected(page_root, number + 1, trait, slope)) for number, slope in enumerate(each)]
        for trait, each in slopes.items()
    }
    found = Contents(page_root).overview("exp", "odd", "residual")
    rows = rows_of(found)
    assert found["traits"] == [TRAIT, OTHER]
    for trait, values in raw.items():
        expected = [(value - mean(values)) / pstdev(values) for value in values]
        assert [rows[str(n)]["rises"][trait] for n in (1, 2, 3)] == pytest.approx(expected)
    assert [rows[str(n)]["trait"] for n in (1, 2, 3)] == [OTHER, TRAIT, TRAIT]
    assert rows["3"]["chance"] == 0  # all random directions rise by as much in each prompt
    assert [rows[str(n)]["stands_out"] for n in (1, 2, 3)] == [False, False, True]
    assert rows["3"]["answer"] == "".join(TOKENS[N_PROMPT:])


def test_a_damaged_projection_is_named_and_the_rest_is_shown(page_root: Path) -> None:
    path = page_root / "experiments/exp/inference" / TRAIT / "residual_stream/odd/1.json"
    path.write_text("[")
    found = Contents(page_root).overview("exp", "odd", "residual")
    assert any(str(path.relative_to(page_root)) in problem for problem in found["problems"])
    assert rows_of(found)["2"]["trait"] == TRAIT


@pytest.mark.parametrize("has_index", [True, False])
def test_a_capture_without_vectors_shows_its_text(page_root: Path, has_index: bool) -> None:
    saved = capture(page_root, "plain", has_index=has_index)
    contents = Contents(page_root)
    found = contents.prompt("plain", "odd", "1")
    parts = [saved[name]["tokens"] for name in ("prompt", "response")]
    assert (found["tokens"], found["n_prompt_tokens"]) == ([*parts[0], *parts[1]], len(parts[0]))
    assert found["text"] == saved["response"]["text"]
    assert contents.prompt_set("plain", "odd")["prompts"][0]["text"] == saved["prompt"]["text"]
    overview = contents.overview("plain", "odd", "residual")
    assert overview["rows"][0]["answer"] == saved["response"]["text"]
    assert overview["missing"]["command"].startswith("tlcapture extract --experiment plain")


def test_a_damaged_capture_is_named(page_root: Path) -> None:
    found = Contents(page_root).prompt("exp", "odd", "3")
    assert found["tokens"] is None
    assert "experiments/exp/inference/raw/residual/odd/3.pt: cannot be read" in found["unread"][0]
    problems = Contents(page_root).overview("exp", "odd", "residual")["unread"]
    assert any("odd/3.pt: cannot be read" in problem for problem in problems)


def capture(
    root: Path, experiment: str, *, has_index: bool = True, prompt_set: str = "odd", **metadata: Any
) -> dict[str, Any]:
    """Write a raw residual file, with its index or as another tool would save it; returns its content."""
    made = tiny_capture(**metadata)
    path = root / f"experiments/{experiment}/inference/raw/residual/{prompt_set}/1.pt"
    path.parent.mkdir(parents=True)
    made.save(path)
    content = torch.load(path, weights_only=True)
    if not has_index:
        torch.save(content, path)
    return dict(content)


def test_a_prompt_of_the_command_line_is_shown_as_it_was_given(page_root: Path) -> None:
    saved = capture(page_root, "plain", prompt_set="adhoc", prompt_text="How do tides work?")
    assert saved["prompt"]["text"] != "How do tides work?"
    (prompt,) = Contents(page_root).prompt_set("plain", "adhoc")["prompts"]
    assert prompt["text"] == "How do tides work?"
