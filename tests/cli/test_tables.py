"""Tables: whole in a pipe, wrapped to the width of a terminal, and columns that never touch."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cli.conftest import Run, make_trait
from tlcapture.cli.main import main
from tlcapture.cli.output.tables import Coloured, Column, table_lines

LONG = "a_category_with_a_long_name/" + "_".join(f"trait{n}" for n in range(12))
COLUMNS = [Column("trait"), Column("layer", right=True), Column("runner-up")]
ROWS = [(LONG, "12345", "mean_diff at layer 3"), ("tone/warm", "1", "-")]
WORDS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=60)


def test_a_pipe_gets_one_whole_line_per_row() -> None:
    width = len(LONG)
    assert table_lines(COLUMNS, ROWS, None) == [
        f"{'trait':<{width}}  layer  runner-up",
        f"{LONG}  12345  mean_diff at layer 3",
        f"{'tone/warm':<{width}}      1  -",
    ]


def test_a_terminal_gets_wrapped_lines_with_all_of_the_text() -> None:
    lines = table_lines(COLUMNS, ROWS, 80)
    assert max(map(len, lines)) <= 80
    body = lines[1:-1]
    assert len(body) > 1
    assert "".join(line.split("  ")[0] for line in body) == LONG
    assert "12345" in body[0]


@settings(deadline=None, database=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4))
@example([("0", "\U0001f3fb", "0")])  # a skin tone, which has no width of its own
def test_cells_are_kept_whole_and_apart_in_a_pipe(rows: list[tuple[str, str, str]]) -> None:
    lines = table_lines([Column(), Column(right=True), Column()], rows, None)
    assert [tuple(line.split()) for line in lines] == rows


@pytest.mark.parametrize("width", [None, 80])
def test_markup_and_control_characters_are_not_interpreted(width: int | None) -> None:
    texts = ["[bold]x[/bold]", "[/]", ":smile:", "\x1b[2J", "one\ntwo"]
    lines = table_lines([Column("text")], [(text,) for text in texts], width)
    assert lines == ["text", "[bold]x[/bold]", "[/]", ":smile:", "�[2J", "one⏎two"]


def test_a_cell_may_have_several_lines() -> None:
    lines = table_lines([Column("prompt"), Column("response")], [("1", ("commits at 3", "Tides rise."))], None)
    assert lines == ["prompt  response", "1       commits at 3", "        Tides rise."]


def test_colours_are_for_terminals() -> None:
    row = [(Coloured("failed", "red"), "BOS")]
    assert table_lines([Column(), Column()], row, None) == ["failed  BOS"]
    assert table_lines([Column(), Column()], row, 80) == ["\x1b[31mfailed\x1b[0m  BOS"]


@pytest.fixture
def long_trait(root: Path) -> Path:
    make_trait(root, LONG, "LOUD", "soft")
    return root


def test_a_command_prints_whole_rows_into_a_pipe(tlcapture: Run, long_trait: Path) -> None:
    lines = tlcapture("traits", "check", "--traits", LONG).output.splitlines()
    assert lines[0].startswith("trait" + " " * (len(LONG) - len("trait")) + "  pairs  twice")
    assert lines[1].split()[:3] == [LONG, "10", "0"]


def test_a_command_wraps_rows_on_a_terminal(long_trait: Path) -> None:
    status, written = on_a_terminal(80, "traits", "check", "--traits", LONG)
    assert status == 1  # words tell the sides apart
    lines = written.splitlines()
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("AUROC of"))]
    assert max(map(len, table)) <= 80
    assert LONG in "".join(line.split(" ")[0] for line in table)


def on_a_terminal(width: int, *words: str) -> tuple[int, str]:
    """The exit status of a command in a fork of this process, and what it writes to a terminal."""
    process, terminal = pty.fork()
    if process == 0:
        code = 99
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ["TERM"] = "xterm"
            main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    written = b""
    while chunk := _read(terminal):
        written += chunk
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), written.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that the other end is closed
        return b""
