"""The overview of a prompt set: rises, what stands out, and the text of captures that are not projected."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import pi, sin
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest
import torch

from tests.input.test_capture_index import made as tiny_capture
from tests.page.conftest import N_PROMPT, TOKENS, TRAIT, projection, write
from tlcapture.commands.projecting import top_traits
from tlcapture.commands.projecting.top_traits import summary_of
from tlcapture.page import long_reading
from tlcapture.page.contents import Contents
from tlcapture.storage.experiments.layout import Layout

OTHER = "style/quiet"
N_DIRECTIONS = 21


@pytest.fixture(autouse=True)
def _against_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the set's three prompts compared with one another."""
    monkeypatch.setattr(top_traits, "FEWEST_TO_COMPARE", 3)


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


def test_rises_are_standard_scores_over_the_set_next_to_their_chance(page_root: Path) -> None:
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
    # All random directions rise by as much in each prompt. Of three prompts, scores follow the arcsine law.
    assert rows["3"]["chance"] == pytest.approx(2**0.5 * sin(pi * (0.95**0.5 - 0.5)))
    assert not any(rows[str(n)]["stands_out"] for n in (1, 2, 3)), "three prompts are too few to show that"
    assert rows["3"]["answer"] == "".join(TOKENS[N_PROMPT:])


def test_a_trait_whose_chance_is_unknown_is_listed_and_never_stands_out(page_root: Path) -> None:
    for number in (1, 2, 3):
        for trait in (TRAIT, OTHER):
            projected(page_root, number, trait, float(number))
        path = page_root / f"experiments/exp/inference/{OTHER}/residual_stream/odd/{number}.json"
        content = json.loads(path.read_text())
        content["metadata"]["chance"] |= {"rises": None}
        path.write_text(json.dumps(content))
    found = Contents(page_root).overview("exp", "odd", "residual")
    assert found["traits"] == [TRAIT, OTHER]
    for row in found["rows"]:
        assert (row["trait"], row["unmeasured"], sorted(row["rises"])) == (TRAIT, [OTHER], sorted([TRAIT, OTHER]))


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


@pytest.fixture
def readings(page_root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompt sets that were read as a whole."""
    found: list[str] = []

    def counted(layout: Layout, prompt_set: str, *rest: Any, **how: Any) -> Any:
        found.append(prompt_set)
        return summary_of(layout, prompt_set, *rest, **how)

    monkeypatch.setattr(long_reading, "summary_of", counted)
    return found


def test_a_set_is_read_again_only_when_a_projection_changed(page_root: Path, readings: list[str]) -> None:
    contents = Contents(page_root)
    projected(page_root, 3, TRAIT, 1.0)
    first = contents.overview("exp", "odd", "residual")
    assert contents.overview("exp", "odd", "residual") == first
    assert readings == ["odd"]
    projected(page_root, 3, TRAIT, 40.0)
    changed = contents.overview("exp", "odd", "residual")
    assert readings == ["odd"] * 2
    assert rows_of(changed)["3"]["rises"][TRAIT] != rows_of(first)["3"]["rises"][TRAIT]
    (page_root / "experiments/exp/inference" / TRAIT / "residual_stream/odd/3.json").unlink()
    assert "rises" not in rows_of(contents.overview("exp", "odd", "residual"))["3"]


def test_requests_at_the_same_time_read_a_set_once(page_root: Path, readings: list[str]) -> None:
    contents = Contents(page_root)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: contents.overview("exp", "odd", "residual"), range(8)))
    assert readings == ["odd"]
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize(
    "read",
    [
        lambda contents: contents.overview("exp", "odd", "residual"),
        lambda contents: contents.average("exp", "odd", *TRAIT.split("/"), "residual"),
    ],
)
def test_reading_a_set_waits_for_shorter_requests(
    page_root: Path, read: Callable[[Contents], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_reading, "_LONGEST_PAUSE", 60)
    projected(page_root, 3, TRAIT, 5.0)
    with ThreadPoolExecutor(1) as threads:
        with long_reading.SHORT_REQUESTS.answering():
            reading = threads.submit(read, Contents(page_root))
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.2)
        assert reading.result(timeout=20)


def test_a_summary_does_not_hold_the_scores_of_a_set(page_root: Path) -> None:
    """What more prompts take in memory at most, next to what the scores of one take when they are read."""
    layout, n_tokens, n_layers = Layout(page_root, "exp"), 200, 20

    def add(numbers: range) -> None:
        content = projection(1)
        tokens = [f"t{number}" for number in range(n_tokens)]
        content["response"] = {"text": " ".join(tokens), "tokens": tokens, "n_tokens": n_tokens}
        row = [[float(layer)] * 3 for layer in range(n_layers)]
        content["projections"]["prompt"] = [row] * N_PROMPT
        content["projections"]["response"] = [row] * n_tokens
        content["dynamics"] |= {"velocity": None, "acceleration": None}
        for number in numbers:
            write(layout.folder / f"inference/{TRAIT}/residual_stream/many/{number}.json", content)

    def peak() -> int:
        tracemalloc.start()
        try:
            summary_of(layout, "many")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    add(range(4))
    summary_of(layout, "many")
    few = peak()
    add(range(4, 24))
    assert (peak() - few) / 20 < n_tokens * n_layers * 3 * 8 / 2  # half of the numbers alone


def test_a_prompt_of_the_command_line_is_shown_as_it_was_given(page_root: Path) -> None:
    saved = capture(page_root, "plain", prompt_set="adhoc", prompt_text="How do tides work?")
    assert saved["prompt"]["text"] != "How do tides work?"
    (prompt,) = Contents(page_root).prompt_set("plain", "adhoc")["prompts"]
    assert prompt["text"] == "How do tides work?"
