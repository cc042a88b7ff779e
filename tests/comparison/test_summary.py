"""The summary of comparisons: what counts as one prompt, and the bounds of a divergence."""

from __future__ import annotations

from typing import Any

from tlcapture.commands.compare_summary import summary_of
from tlcapture.comparison.comparison_files import ComparisonFile

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
