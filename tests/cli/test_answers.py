"""The answer to a prompt of the command line: its whole text, in colour by the trait that stands out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.captures.capture import Capture
from tlcapture.cli.output.answers import show_answers
from tlcapture.cli.output.console import Console
from tlcapture.commands.projecting.top_traits import OverSamples, TopTrait, pieces_of
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import printable

PIECES = [("Tides", -0.5), (" rise", 1.0), (".", None)]


def _shown(capsys: pytest.CaptureFixture[str], *, rise: float, calibrated: float | None = 0.9) -> str:
    top = TopTrait("1", "style/formality", rise, 2.0, None, None, calibrated, "Tides rise.", pieces=PIECES)
    show_answers(Console(), Layout(Path(), "exp"), "adhoc", ["1"], [top])
    return capsys.readouterr().out


def test_an_answer_is_coloured_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    piped = _shown(capsys, rise=3)
    assert piped == "answer 1: style/formality stands out (a terminal shows it in colour)\nTides rise.\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said, answer, _ = _shown(capsys, rise=3).splitlines()
    assert said.startswith("answer 1: coloured by style/formality, which stands out: red as in the positive")
    assert "\x1b[38;5;16;48;5;203m rise\x1b[0m" in answer  # the largest score, the strongest red
    assert "\x1b[38;5;16;48;5;153mTides\x1b[0m" in answer  # half as much, in blue
    assert "red above 0" in _shown(capsys, rise=3, calibrated=None)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in _shown(capsys, rise=3)


def test_an_answer_of_which_nothing_stands_out_is_plain_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = _shown(capsys, rise=1)
    assert shown == "answer 1: no trait stands out from chance, so it is not coloured\nTides rise.\n\n"


def test_an_answer_of_which_chance_is_unknown_says_that(capsys: pytest.CaptureFixture[str]) -> None:
    top = TopTrait("1", "style/formality", 3.0, None, None, None, None, "Tides rise.", pieces=PIECES)
    show_answers(Console(), Layout(Path(), "exp"), "adhoc", ["1"], [top])
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "answer 1: whether a trait stands out is unknown, so it is not coloured"


def test_an_answer_without_text_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    top = TopTrait("1", "style/formality", 0.0, 2.0, None, None, None, "\n", pieces=[])
    show_answers(Console(), Layout(Path(), "exp"), "adhoc", ["1"], [top])
    assert "(no text)" in capsys.readouterr().out.splitlines()


@given(st.lists(st.text(min_size=1, max_size=3), max_size=8))
def test_pieces_are_the_text(words: list[str]) -> None:
    scores = [float(number) for number in range(len(words))]
    assert "".join(piece for piece, _ in pieces_of("".join(words), words, scores)) == "".join(words)


def test_tokens_that_share_a_character_are_one_piece() -> None:
    tokens = ["Hi", " \ufffd", "\ufffd", "\ufffd", "!", "<|end|>"]
    found = pieces_of("Hi 🌊!", tokens, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found == [("Hi", 1.0), (" 🌊", 3.0), ("!", 5.0)]
    assert pieces_of("🌊", ["\ufffd", "\ufffd"], [1.0, None]) == [("🌊", 1.0)]
    assert pieces_of("", ["<|end|>"], [1.0]) == []


@pytest.mark.parametrize("words", [(), ("--no-project",), ("--samples", 2)], ids=["plain", "no project", "samples"])
def test_a_set_that_is_projected_onto_nothing_shows_its_answers(
    capture: Callable[..., Result], raw: Path, words: tuple[object, ...]
) -> None:
    done = capture(*words)
    captures = [Capture.open(path) for path in sorted(raw.glob("*.pt"))]
    for each in captures:
        (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [each.name]]
        assert line.split(maxsplit=1)[1] == printable(each.response.text).strip()
    assert "rise" not in done.stdout
    assert done.stdout.splitlines().count("short: projected onto no trait") == 1
    again = capture("--replay", "--logit-lens")
    assert not [line for line in again.stdout.splitlines() if line.split()[:1] == [captures[0].name]]


def test_a_set_without_responses_is_not_called_unprojected(
    capture: Callable[..., Result], extract: Callable[..., Result]
) -> None:
    assert extract("--component", "residual", "--methods", "mean_diff").exit_code == 0
    done = capture("--max-new-tokens", 0)
    assert "short: no rise is known without tokens of the response" in done.stdout
    assert "projected onto no trait" not in done.stdout


def test_the_samples_of_a_given_prompt_are_shown_where_nothing_is_projected(capture: Callable[..., Result]) -> None:
    done = capture("--no-project", "--samples", 2, "--temperature", 2, prompts=("--prompt", "Why does it rain?"))
    shown = done.stdout.splitlines()
    assert [line for line in shown if line.startswith("adhoc/")] == ["adhoc/1.s1:", "adhoc/1.s2:"]


def test_an_answer_of_several_samples_says_which_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    over = OverSamples(3, 0, None, None)
    top = TopTrait("1", "style/formality", 3.0, 2.0, None, None, None, "Tides rise.", over)
    show_answers(Console(), Layout(Path(), "exp"), "adhoc", ["1"], [top])
    assert capsys.readouterr().out.startswith("answer 1, the first sample: style/formality stands out")
