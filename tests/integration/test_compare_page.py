"""The examples of docs/compare.md run, and print what the page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tlcapture.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*adds nothing over layer 0")
def test_the_examples_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path))
    (commands,), (printed, frames) = blocks("bash"), blocks("text")
    for line in commands.splitlines():
        done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    shown = done.stdout[done.stdout.index("exp/single_trait@formal less") : done.stdout.index("wrote 6 files")]
    capsys.readouterr()
    exec(blocks("python")[0], {})
    assert without_ends(shown) == without_ends(printed)
    assert without_ends(capsys.readouterr().out) == without_ends(frames)


def without_ends(text: str) -> list[str]:
    """The lines of a text without blanks at their ends."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def test_every_option_of_the_command_is_on_the_page() -> None:
    from tlcapture.cli.compare import compare

    general = {"--root", "--verbose", "--quiet", "--log-file", "--json", "--fsync", "--ray-address", "--workers"}
    general |= {"--collect", "--gpus-per-worker", "--cpus-per-worker", "--help"}
    for parameter in compare.params:
        for option in parameter.opts:
            assert not option.startswith("--") or option in general or f"`{option}" in PAGE, option
