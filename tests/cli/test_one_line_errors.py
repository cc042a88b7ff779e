"""Errors of the command line itself look like all others: one line, `error: ...`, and exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.cli.test_places import STORED
from tlcapture.errors import StorageError
from tlcapture.text import first_lines

Command = Callable[..., Result]
PLAN = ("plan", "--prompts", "1", "--prompt-tokens", "1", "--new-tokens", "1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["captur"], "no such command 'captur': did you mean 'capture'?"),
        (["--nothing"], "no such option '--nothing'"),
        (["capture", "--promt", "x"], "no such option '--promt': did you mean '--prompt'? see"),
        (["traits", "cluster"], "no such command 'cluster': commands: check, import, list"),
        (["capture"], "give one of --prompt-set NAME, --prompt TEXT"),
        (["capture", "--limit", "0", "--prompt", "x"], "invalid value for '--limit': 0 is not at least 1"),
        (
            ["capture", "--limit", "9" * 12, "--prompt", "x"],
            f"invalid value for '--limit': {'9' * 12} is not less than",
        ),
        *(
            (["capture", "--prompt", "x", option, value], f"{option} needs --executor ray")
            for option, value in (("--workers", "2"), ("--gpus-per-worker", "0"), ("--cpus-per-worker", "2"))
        ),
        (["capture", "--sampling", "odd", "--prompt", "x"], "invalid value for '--sampling'"),
        (["capture", "--prompt", "x", "more"], "got unexpected extra argument"),
        (["traits", "import", "x.pt"], "missing option '--trait'"),
        (["traits", "chek"], "no such command 'chek': did you mean 'check'?"),
        (["export", "--experiment", "nix", "--to", "x"], "no experiment 'nix'"),
        (["project", "--prompt-set", "nix"], "no experiment 'default'"),
        (["capture", "--root", "/nowhere", "--prompt", "x"], "invalid value for '--root'"),
        (["capture", "--prompt", "x", "--stop", "\udcff"], "stop '\\udcff': expected valid Unicode"),
        (["capture", "--prompt", "x", "--log-file", ""], "invalid value for '--log-file': '' is not a path"),
        (["view", "--export", ""], "invalid value for '--export': '' is not a path"),
        (["view", "--max-size", "nan"], "invalid value for '--max-size': nan is not a finite number"),
        ([*PLAN, "--tokens-per-second", "inf"], "invalid value for '--tokens-per-second': inf is not a finite number"),
        ([*PLAN, "--gpu", "h100", "--efficiency", "1e-320"], "invalid value for '--efficiency': 1e-320 is not from"),
        ([*PLAN, "--budget", "9" * 400], f"invalid value for '--budget': {'9' * 400!r} is not a size: it is larger"),
        (
            ["plan", "--prompts", "1", "--prompt-tokens", "9" * 20, "--new-tokens", "1"],
            "invalid value for '--prompt-tok",
        ),
    ],
)
def test_an_error_is_one_line(tlcapture: Command, words: list[str], says: str) -> None:
    result = tlcapture(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {says}")


def test_a_group_without_a_command_still_shows_its_help(tlcapture: Command) -> None:
    assert "Commands" in tlcapture("traits").output


@pytest.mark.parametrize("typed", ["שלום 🌊", "plain"])
def test_a_text_is_utf_8_in_any_locale(typed: str) -> None:
    from tlcapture.cli.options.types import Text

    came = typed.encode().decode("ascii", "surrogateescape")  # as the C locale reads it
    assert Text().convert(came, None, None) == typed
    broken = b"\xff".decode("ascii", "surrogateescape")
    assert Text().convert(broken, None, None) == broken  # refused as a prompt


def test_of_very_many_lines_the_first_ones_are_shown_and_the_number_of_the_others() -> None:
    lines = [f"short/{number}: too long" for number in range(10_000)]
    assert first_lines(lines[:100], ": in the record") == lines[:100]
    assert first_lines(lines, ": in the record") == [*lines[:100], "and 9,900 more: in the record"]


def test_the_failures_of_a_large_run_are_in_its_record(tlcapture: Command, root: Path) -> None:
    shutil.copytree(STORED, root / "experiments" / "exp")
    raw = root / "experiments" / "exp" / "inference" / "raw" / "residual" / "short"
    for number in range(2, 112):
        (raw / f"{number}.pt").write_bytes(b"damaged")
    result = tlcapture("project", "--experiment", "exp", "--prompt-set", "short")
    failures = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert (result.exit_code, len(failures)) == (1, 101)
    place = failures[-1].removeprefix("failed: and 10 more: all are in ")
    assert len(json.loads(Path(place).read_text())["failures"]) == 110


def test_an_error_is_one_line_whatever_a_file_holds() -> None:
    assert str(StorageError("1.json: its metadata names prompt a\nb\x1b[2J\u2028: it was moved")) == (
        r"1.json: its metadata names prompt a\nb\x1b[2J\u2028: it was moved"
    )
