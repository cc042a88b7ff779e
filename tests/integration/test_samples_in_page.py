"""The page shows the samples of a prompt together: one entry in the picker, another picker for the sample, a mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from tests.browser import Watched, browser, server
from tests.page.conftest import N_PROMPT, TOKENS, TRAIT, projection, scores, write, write_experiment

HERE = f"view=dynamics&experiment=exp&set=odd&trait={TRAIT}&calibrated=0"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Prompt 5 has three samples, whose projections are those of prompts 1 to 3."""
    root = write_experiment(tmp_path_factory.mktemp("samples"))
    folder = root / "experiments/exp/inference" / TRAIT / "residual_stream/odd"
    for sample in (1, 2, 3):
        content: dict[str, Any] = projection(sample)
        content["metadata"] |= {"prompt_id": 5, "sample": sample}
        write(folder / f"5.s{sample}.json", content)
    with server(Path(root), "exp") as (base, _), browser() as launched:
        page = Watched(launched.new_context(viewport={"width": 1366, "height": 900}), base)
        yield page
        assert page.wrong == []


def options(opened: Watched, label: str) -> list[str]:
    opened.page.click(f"#pickers button[aria-label={label}]")
    found = opened.page.locator(f"#pickers .picker:has(button[aria-label={label}]) li").all_inner_texts()
    opened.page.keyboard.press("Escape")
    return [text.split("\n")[0] for text in found]


def named(opened: Watched, name: str) -> list[dict[str, Any]]:
    return [trace for trace in opened.traces() if trace.get("name") == name]


def test_a_prompt_is_listed_once_and_a_second_picker_has_its_samples(opened: Watched) -> None:
    opened.open(f"{HERE}&prompt=5.s2")
    assert options(opened, "sample") == ["1 of 3", "2 of 3", "3 of 3"]
    assert opened.text("#pickers button[aria-label=sample]").endswith("2 of 3")
    opened.open(f"{HERE}&prompt=2")
    assert opened.page.locator("#pickers button[aria-label=sample]").count() == 0
    assert named(opened, "mean over samples") == []
    opened.open("view=overview&experiment=exp&set=odd")
    rows = opened.page.locator("#view tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows if row] == ["1", "2", "3", "5"]
    assert "3 samples" in rows[3]


def test_the_mean_and_the_spread_over_samples_lie_over_the_tokens_of_each(opened: Watched) -> None:
    opened.open(f"{HERE}&prompt=5.s1")
    (line,), (band,) = named(opened, "mean over samples"), named(opened, "one standard deviation over samples")
    values = [[scores(sample)[token][1][-1] for sample in (1, 2, 3)] for token in range(1, len(TOKENS))]
    assert line["x"] == list(range(1, len(TOKENS)))
    assert line["y"] == pytest.approx([mean(each) for each in values])
    assert band["y"][: len(values)] == pytest.approx([mean(each) + stdev(each) for each in values])
    responses = [mean(scores(sample)[token][1][-1] for token in range(N_PROMPT, len(TOKENS))) for sample in (1, 2, 3)]
    note = opened.text("#spread")
    assert "over 3 samples" in note and f"{mean(responses):g}" in note and f"{stdev(responses):g}" in note


def test_the_mean_can_be_left_out(opened: Watched) -> None:
    opened.open(f"{HERE}&prompt=5.s1&spread=0")
    assert named(opened, "mean over samples") == [] and opened.page.locator("#spread").count() == 0
