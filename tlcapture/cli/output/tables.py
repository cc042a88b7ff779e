"""Tables on the command line, laid out by rich.

    table_lines([Column("trait"), Column("layer", right=True)], [("tone/loud", "16")], terminal_width(sys.stdout))

On a terminal, cells wrap to fit its width. In a pipe or a file, every row is as wide as it needs to be, so that no text
is cut or wrapped. Cells are plain text: markup in them is not interpreted, and control characters are replaced.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import click

from tlcapture.text import printable

if TYPE_CHECKING:
    from rich.text import Text

_UNLIMITED = 1_000_000  # columns
_GAP = 2  # blanks between columns


@dataclass(frozen=True)
class Column:
    """A column: its header, whether it is aligned to the right, and its least width in characters."""

    name: str = ""
    right: bool = False
    min_width: int = 0


@dataclass(frozen=True)
class Coloured:
    """A cell's text in one of the terminal's colours, such as `red`; `None` for the default colour."""

    text: str
    colour: str | None = None


Cell = str | Coloured | tuple[str, ...]
"""Text, coloured text, or the lines of a cell."""


def terminal_width(stream: IO[str]) -> int | None:
    """The width of the terminal that a stream writes to, in characters; `None` if it is not a terminal."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def table_lines(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], width: int | None) -> list[str]:
    """The lines of a table that is at most `width` characters wide; `None`: as wide as its text, and without colours.

    The header is left out where no column has a name.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="", show_header=_has_header(columns))
    for column in columns:
        table.add_column(
            _text(column.name),
            justify="right" if column.right else "left",
            min_width=max(1, column.min_width),  # a modifier alone has no width, and would be left out
            no_wrap=width is None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(_text, row))
    console = Console(
        width=width or _UNLIMITED,
        color_system=None if width is None else "standard",
        force_terminal=width is not None,
        legacy_windows=False,
    )
    with console.capture() as written:
        console.print(table)
    return [line.rstrip() for line in written.get().rstrip("\n").split("\n")]


def echo_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table to standard output."""
    for line in table_lines(columns, rows, terminal_width(sys.stdout)):
        click.echo(line)


def _has_header(columns: Sequence[Column]) -> bool:
    return any(column.name for column in columns)


def _text(cell: Cell) -> Text:
    """A cell as rich's text, which is not searched for markup."""
    from rich.text import Text

    if isinstance(cell, Coloured):
        return Text(printable(cell.text), style=cell.colour or "")
    return Text(printable(cell) if isinstance(cell, str) else "\n".join(map(printable, cell)))
