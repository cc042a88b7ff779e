"""`tlcapture extract` and `evaluate` on the fewest examples, and on examples that hardly differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tlcapture.storage.files import read_json

Run = Callable[..., Result]
Row = dict[str, str]


def pairs(word: str, n: int, each: int = 1) -> list[Row]:
    """`each` responses with a word to each of `n` prompts."""
    return [
        {"pair": str(number), "prompt": f"say {number}", "response": word * more + str(number)}
        for number in range(n)
        for more in range(1, each + 1)
    ]


def unpaired(word: str, n: int) -> list[Row]:
    """Responses to `n` prompts without a pair."""
    return [{"prompt": f"tell {number}", "response": f"{word} {number}"} for number in range(n)]


@pytest.fixture
def evaluate(tlcapture: Run, root: Path, tiny_folder: Path) -> Run:
    """Extract and evaluate `tone/few` of the given examples; the result is that of `evaluate`."""

    def run(positive: Iterable[Row], negative: Iterable[Row]) -> Result:
        folder = root / "datasets" / "traits" / "tone" / "few"
        folder.mkdir(parents=True)
        for side, rows in (("positive", positive), ("negative", negative)):
            (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = ("--experiment", "exp", "--component", "residual", "--model", tiny_folder)
        assert tlcapture("extract", *common, "--traits", "tone/few").exit_code == 0
        return tlcapture("evaluate", *common)

    return run


def evaluation(root: Path) -> Any:
    return read_json(root / "experiments" / "exp" / "extraction" / "extraction_evaluation.json")


@pytest.mark.parametrize("n", [4, 7])
@pytest.mark.parametrize("make", [pairs, unpaired])
def test_an_effect_size_of_one_held_out_example_is_undefined_and_the_rest_is_scored(
    evaluate: Run, root: Path, make: Callable[[str, int], list[Row]], n: int
) -> None:
    result = evaluate(make("LOUD", n), make("soft", n))
    assert result.exit_code == 0, result.output
    assert "the effect size of residual probe is undefined at layers 0 to 2" in result.output
    found = evaluation(root)
    assert {row["val_effect_size"] for row in found["all_results"]} == {None}
    assert all(row["val_effect_size_interval"] == [None, None] for row in found["all_results"])
    best = found["best_vectors"]["tone/few"]  # selected over all pairs
    assert best["cv_effect_size"] == max(row["cv_effect_size"] for row in found["all_results"])
    assert best["p"] > 0.05
    assert "no better than vectors of shuffled labels" in best["verdict"]


def test_where_shuffled_labels_separate_all_it_says_once_that_more_pairs_are_needed(evaluate: Run, root: Path) -> None:
    result = evaluate(pairs("LOUD", 10), pairs("soft", 10))
    assert {row["null_auroc_p95"] for row in evaluation(root)["all_results"]} == {1.0}
    assert result.stderr.count("too few examples to tell whether residual vectors are better than chance") == 1
    assert "no better than the best vector" not in result.stderr
    verdict = evaluation(root)["best_vectors"]["tone/few"]["verdict"]
    assert verdict.startswith("no better than") and verdict.endswith(": too few examples to tell")
    assert verdict in result.output


def test_a_doubt_that_several_traits_share_is_told_once(evaluated: Result) -> None:
    assert evaluated.stderr.count("too few examples to tell whether residual vectors are better than chance") == 1
    assert "tone/loud, tone/warm: too few examples to tell" in evaluated.stderr


def test_where_more_pairs_are_needed_wide_intervals_are_not_listed_by_layer(evaluate: Run, root: Path) -> None:
    words = ["LOUD", "soft"]
    sides = [
        [{"pair": str(n), "prompt": f"say {n}", "response": f"{words[(n + n // 3 + k) % 2]} {n}"} for n in range(10)]
        for k in (0, 1)
    ]
    result = evaluate(*sides)
    rows = evaluation(root)["all_results"]
    assert {row["null_auroc_p95"] for row in rows} == {1.0}
    assert any(low <= 0 <= high for low, high in (row["val_effect_size_interval"] for row in rows))
    assert [line.split(": ")[2][:28] for line in result.stderr.splitlines() if "warning" in line] == [
        "too few examples to tell whe"
    ]


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (pairs("LOUD", 2, each=2), pairs("soft", 2, each=2)),
        (pairs("LOUD", 1, each=5), pairs("soft", 1, each=5)),
        (pairs("LOUD", 2) + unpaired("LOUD", 2), pairs("soft", 2) + unpaired("soft", 2)),
        (pairs("LOUD", 2) + unpaired("LOUD", 9), pairs("soft", 2) + unpaired("soft", 2)),
    ],
)
def test_without_held_out_examples_of_both_sides_evaluate_says_how_many_it_needs(
    evaluate: Run, root: Path, positive: list[Row], negative: list[Row]
) -> None:
    result = evaluate(positive, negative)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "tone/few" in line]
    assert "no examples are held out on one or both sides: expected at least three pairs" in line


def test_three_pairs_are_enough_for_one_to_be_held_out(evaluate: Run, root: Path) -> None:
    assert evaluate(pairs("LOUD", 3, each=2), pairs("soft", 3, each=2)).exit_code == 0
    assert {row["n_val"] for row in evaluation(root)["all_results"]} == {4}


def test_pairs_that_repeat_one_another_count_as_one(evaluate: Run, root: Path) -> None:
    same = [{"pair": str(number), "prompt": "say it"} for number in range(10)]
    result = evaluate([{**row, "response": "YES"} for row in same], [{**row, "response": "no"} for row in same])
    assert result.exit_code == 1
    assert "those that repeat one another count as one" in result.output


def test_a_side_that_does_not_vary_is_scored_by_the_other(evaluate: Run, root: Path) -> None:
    result = evaluate([{**row, "response": "YES"} for row in pairs("", 10)], pairs("soft", 10))
    assert result.exit_code == 0, result.output
    assert evaluation(root)["best_vectors"]["tone/few"]["val_auroc"] == 1.0
