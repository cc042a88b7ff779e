"""Where progress is not shown as a bar: how much is done, in a few lines, however much there is to do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from click.testing import Result

from tlcapture.cli.output.console import Console

Command = Callable[..., Result]


def _lines(capsys: pytest.CaptureFixture[str], unit: str, total: int, steps: list[tuple[int, str | None]]) -> list[str]:
    with Console().progress(total, "set", unit) as progress:
        for units, done in steps:
            progress.advance(units, done=done)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("n_prompts", [60, 5000])
def test_many_prompts_take_few_evenly_spaced_lines(capsys: pytest.CaptureFixture[str], n_prompts: int) -> None:
    lines = _lines(capsys, "prompt", n_prompts, [(1, f"set/{each}") for each in range(1, n_prompts + 1)])
    assert len(lines) in (20, 21)
    assert lines[0] == f"set/1 (1 of {n_prompts})"
    shown = [int(line.split("(")[1].split()[0]) for line in lines]
    gaps = {after - before for before, after in pairwise(shown)}
    assert gaps <= {n_prompts // 20, n_prompts // 20 - 1}


def test_few_prompts_have_a_line_each_with_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _lines(capsys, "prompt", 3, [(1, "set/a"), (1, None), (1, "set/c")])
    assert lines == ["set/a (1 of 3)", "set (2 of 3)", "set/c (3 of 3)"]


def test_tokens_are_a_percentage_of_the_most_there_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, str | None]] = [(30, None), (20, "set/1: 30 tokens"), (50, None), (0, "set/2: 50 tokens")]
    assert _lines(capsys, "token", 100, steps) == ["set/1: 30 tokens (50%)", "set/2: 50 tokens (100%)"]


def test_one_prompt_of_which_nothing_is_said_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _lines(capsys, "prompt", 1, [(1, None)]) == []


def test_polls_and_quiet_runs_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _lines(capsys, "prompt", 9, [(0, None)] * 50) == []
    with Console(quiet=True).progress(2, "set", "prompt") as progress:
        progress.advance(1, done="set/1")
    assert capsys.readouterr().err == ""


def test_batches_of_a_cluster_say_themselves_how_many_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Their tokens are counted later, and a batch of which nothing was counted yet is done all the same."""
    with Console().progress(1000, "Ray", "token") as progress:
        for number in range(1, 7):
            progress.advance(done=f"worker: {number} of 6 batches", share=number / 6)
    assert capsys.readouterr().err.splitlines() == [f"worker: {number} of 6 batches" for number in range(1, 7)]


def test_traits_are_counted_over_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.task(3, 10)
    with console.progress(128, "style/formality", "example") as progress:
        progress.advance(128)
        progress.advance(done="style/formality: 128 examples")
    assert capsys.readouterr().err == "style/formality: 128 examples (3 of 10)\n"
