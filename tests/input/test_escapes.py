"""Control characters and markup in prompts and tokens are escaped for terminal and page (real commands, tiny model)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cli.conftest import make_prompt_set, make_trait
from tests.evidence import Evidence
from tests.input.strategies import at_most
from tlcapture.captures.capture import Capture
from tlcapture.page.contents import Contents
from tlcapture.text import printable

Run = Callable[..., Result]

TEXTS = {
    "clears the screen": "\x1b[2J\x1b[H",
    "sets the title": "\x1b]0;owned\x07",
    "a hyperlink": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "a clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "C1 controls": "\x9b2J\x9d0;owned\x9c\x85",
    "carriage return": "safe\rFAKE: wrote 0 files",
    "backspaces": "abc\b\b\bxyz\x7f",
    "bidi overrides": "\u202egnp.exe\u202c \u2066x\u2069\u200f",
    "line separators": "one\u2028two\u2029three\x0bfour\x0c",
    "markup": "<img src=x onerror=alert(1)></script><script>alert(2)</script>",
    "a template": "{{7*7}} {% raw %} ${7*7}",
    "joiners and emoji": "a\u200db \U0001f468\u200d\U0001f469 \ufeff",
    "NUL": "a\0b\0c",
}


def dangerous(text: str) -> set[str]:
    """Characters that control a terminal: control and format characters, line separators."""
    kinds = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return {character for character in text if unicodedata.category(character) in kinds} - {"\n"}


@pytest.fixture
def hostile(root: Path) -> Path:
    make_prompt_set(root, "hostile", list(TEXTS.values()))
    make_trait(root, "tone/loud", "LOUD \x1b[31m", "soft \u202e")
    return root


def test_prompts_and_tokens_reach_the_terminal_and_the_page_as_plain_text(
    tlcapture: Run, hostile: Path, tiny_folder: Path, evidence: Evidence
) -> None:
    common = ("--experiment", "exp")
    model = ("--model", tiny_folder)
    every_view = ("--attention", "--logit-lens", "--prompt-set", "hostile", "--max-new-tokens", "6")
    vectors = ("--traits", "tone/loud", "--component", "residual", "--methods", "mean_diff", "--layers", "1")
    commands: list[tuple[object, ...]] = [
        ("extract", *common, *model, *vectors),
        ("capture", *common, *model, *every_view),
        ("project", *common, "--prompt-set", "hostile", "--dynamics-only"),
        ("traits", "check", "--traits", "tone/loud"),
        ("traits", "list", *common),
        ("view", *common, "--export", hostile / "page.html"),
    ]
    for words in commands:
        result = tlcapture(*words)
        assert result.exit_code == int(words[:2] == ("traits", "check")), result.output  # words tell the sides apart
        assert not dangerous(result.stdout + result.stderr), words
    sizes = [len(path.read_bytes()) for path in hostile.glob("experiments/exp/inference/raw/residual/hostile/*.pt")]
    assert len(sizes) == len(TEXTS)

    page = (hostile / "page.html").read_text(encoding="utf-8")
    for text in TEXTS.values():
        assert text not in page
    contents = Contents(hostile)
    for number, (name, text) in enumerate(TEXTS.items(), start=1):
        path = hostile / f"experiments/exp/inference/raw/residual/hostile/{number}.pt"
        capture = Capture.open(path)
        assert text in capture.prompt.text
        assert not re.search("[<>]", re.sub(r"</?(div|span)\b[^<>]*>", "", capture._repr_html_()))
        assert not dangerous(capture._repr_html_())
        assert not dangerous(repr(capture))
        assert contents.prompt("exp", "hostile", str(number))["tokens"] == capture.tokens
        evidence.tried("prompts and tokens through the commands", name)


def test_the_error_for_a_refused_prompt_has_no_control_characters(
    tlcapture: Run, root: Path, evidence: Evidence
) -> None:
    folder = root / "datasets" / "inference"
    folder.mkdir(parents=True)
    for text in TEXTS.values():
        for content in (
            {"name": "x", "prompts": [{"id": text, "text": "a"}]},
            {"name": text, "prompts": [{"id": text, "text": "a"}]},
            {"name": "x", "prompts": [{"id": "1", text: "b"}]},
            {"name": "x", "prompts": [{"id": "1", "text": {text: text}}]},
        ):
            (folder / "x.json").write_text(json.dumps(content))
            result = tlcapture("capture", "--experiment", "exp", "--prompt-set", "x")
            assert result.exit_code == 2
            assert not dangerous(result.stderr)
            assert result.stderr.count("\n") == 1
            evidence.tried("prompts and tokens through the commands", "in an error")


@pytest.mark.parametrize("word", ["\udcff", "a\udc80b", "\x1b[2J", "\u202e", "\x9b", "a\nb"])
@pytest.mark.parametrize(
    "option", ["--experiment", "--prompt-set", "--prompt", "--model", "--system-prompt", "--method", "--root"]
)
def test_arguments_that_are_not_valid_text_are_refused_with_a_printable_error(
    tlcapture: Run,
    root: Path,
    tiny_folder: Path,
    evidence: Evidence,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    word: str,
) -> None:
    """Python decodes arguments that are not valid UTF-8 with lone surrogates."""
    monkeypatch.chdir(root)  # some of the words name folders
    words = {"--experiment": "exp", "--model": tiny_folder, "--max-new-tokens": 1, "--no-project": None}
    if option not in ("--prompt", "--prompt-set"):
        words["--prompt"] = "hello"
    words[option] = word
    result = tlcapture("capture", *[each for pair in words.items() for each in pair if each is not None])
    assert result.exit_code in (0, 1, 2)
    assert not dangerous(result.stdout + result.stderr)
    (result.stdout + result.stderr).encode()
    evidence.tried("command-line arguments", option)


def test_printable_removes_every_control_character(evidence: Evidence) -> None:
    @settings(max_examples=at_most(500), deadline=None, database=None)
    @given(st.text(st.characters()) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Zs"])))
    def attempt(text: str) -> None:
        shown = printable(text)
        assert not dangerous(shown)
        assert "\n" not in shown
        assert len(shown) == len(text)
        shown.encode()

    attempt()
    evidence.tried("text for a terminal", "any characters", at_most(500))
