"""The summary of comparisons: what counts as one prompt, and the bounds of a divergence."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlcapture.commands.comparing.summary import SavedComparisons, summary_of
from tlcapture.comparison import paired
from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.storage.experiments.comparisons import comparison_file
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_json

TRAIT = "tone/loud"


def compared(
    change: float,
    kl: float,
    digest: str | None,
    sample: int | None = None,
    random: tuple[str, list[float]] | None = None,
) -> ComparisonFile:
    """A comparison of one prompt of one token, with a response of one."""
    trait = {"layer": 0, "method": "probe", "difference": [0.0, change], "mean_a": 0.0, "mean_b": change}
    if random is not None:
        trait["random"] = {"directions": random[0], "changes": random[1]}
    value: dict[str, Any] = {
        "a": "exp/short",
        "b": "other/short",
        "tokens": ["a", "b"],
        "n_prompt_tokens": 1,
        "traits": {TRAIT: trait},
        "residual": {"cosine": [[1.0], [0.5]], "norm_ratio": [[1.0], [1.0]]},
        "kl": [0.0, kl],
        "metadata": {
            "prompt_set": "short", "prompt_id": 1, "n_layers": 1, "sample": sample, "prompt_digest": digest
        },
    }  # fmt: skip
    return ComparisonFile.model_validate(value)


def test_a_prompt_with_several_ids_counts_once() -> None:
    """Six copies of a prompt change alike, which is no evidence that other prompts would."""
    copies = summary_of({str(number): compared(1.0, 0.1, "same") for number in range(6)})
    assert (copies.n_prompts, copies.n_files, copies.traits[TRAIT].stands_out) == (1, 6, False)
    for digests in (list("abcdef"), [None] * 6):  # of files of earlier versions, too
        apart = summary_of({str(number): compared(1.0, 0.1, digest) for number, digest in enumerate(digests)})
        assert (apart.n_prompts, apart.traits[TRAIT].stands_out) == (6, True)


def test_random_directions_are_averaged_as_the_trait_is() -> None:
    def p_random(*random: tuple[str, list[float]] | None) -> float | None:
        files = {
            f"{n}.s{s}": compared(1.0, 0.1, None, s, each)
            for n, s, each in zip((1, 1, 2), (1, 2, 1), random, strict=True)
        }
        return summary_of(files).traits[TRAIT].p_random

    usual = [0.1] * 198
    one, other, last = ([*usual, *each] for each in ((4.0, 0.0), (0.0, 0.0), (0.0, 0.9)))
    assert p_random(("a", one), ("a", other), ("a", last)) == 2 / 201  # 1.0 of the first: (2 + 0) / 2
    assert p_random(("a", one), ("a", other), ("b", last)) is None
    assert p_random(("a", one), ("a", other), None) is None


def test_samples_of_a_prompt_count_once() -> None:
    files = {f"{number}.s{sample}": compared(1.0, 0.1, None, sample) for number in (1, 2) for sample in (1, 2, 3)}
    assert summary_of(files).n_prompts == 2


def test_a_mean_divergence_is_not_said_to_be_negative() -> None:
    found = summary_of({str(number): compared(0.0, kl, str(number)) for number, kl in enumerate([0.0, 0.01, 2.0])}).kl
    assert found is not None and found.interval is not None
    assert found.interval[0] == 0 < found.mean < found.interval[1]


def saved(root: Path, files: dict[str, ComparisonFile]) -> SavedComparisons:
    layout = Layout(root, "exp")
    for name, each in files.items():
        write_json(comparison_file(layout, "other", "short", name), each.model_dump(exclude_unset=True))
    return SavedComparisons(layout, "other", "short")


def test_a_summary_holds_one_file_at_a_time(tmp_path: Path) -> None:
    usual = ("a", [0.1] * 3)
    files = {str(number): compared(number / 8, 0.1, f"p{number}", random=usual) for number in range(20)}
    alive: list[weakref.ref[ComparisonFile]] = []
    most = 0

    def count(name: str, file: ComparisonFile) -> None:
        nonlocal most
        alive.append(weakref.ref(file))
        most = max(most, sum(each() is not None for each in alive))

    gc.collect()
    found = saved(tmp_path, files).summary(count)
    assert (most, found.n_files, found.names) == (2, 20, list(files))  # the first and this one
    assert found.to_json() == summary_of(files).to_json()


def test_equal_prompts_that_are_apart_are_averaged_first_as_those_together_are(tmp_path: Path) -> None:
    """Their random directions too, though comparisons are read one after another."""
    changes = {"x": [4.0, 0.5], "y": [1.0, 2.0], "z": [0.0, 3.0]}
    random = {name: ("a", [value, -value, 3 * value]) for name, value in (("x", 0.5), ("y", 0.25), ("z", 0.125))}
    pairs = [(digest, number) for digest in "xyz" for number in (0, 1)]

    def summary(folder: str, order: list[tuple[str, int]]) -> Any:
        files = {
            str(at): compared(changes[digest][number], 0.5, digest, random=random[digest])
            for at, (digest, number) in enumerate(order)
        }
        found = saved(tmp_path / folder, files).summary().to_json()
        return {**found, "tokens": None}

    together, apart = summary("together", pairs), summary("apart", sorted(pairs, key=lambda pair: pair[1]))
    assert together["n_prompts"] == 3 and together["traits"][TRAIT]["p_random"] is not None
    assert apart == together


def test_the_flips_of_many_prompts_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate([*paired._signs(20)])
    monkeypatch.setattr(paired, "_MOST_SIGNS", 20 * 300)
    pieces = [*paired._signs(20)]
    assert max(map(len, pieces)) == 300
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
