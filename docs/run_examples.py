"""Run the examples of pages in an empty folder each, and put what they print into the pages: `make examples`.

A text block shows what the example before it prints. There `...` stands for lines that are left out, and a line
that ends in ` ...` is cut.

python -m docs.run_examples [--check] [PAGE ...]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

DOCS = Path(__file__).parent
PAGES = ("tutorial.md", "how-to/one-answer.md", "how-to/studies.md", "compare.md")
PICTURES = {"tides.png": "tutorial.md"}  # in docs/pictures, and the pages whose examples save them
_BLOCK = re.compile(r"```(bash|python|text)\n(.*?)```", re.DOTALL)
_MEASURED = re.compile(r"\d+(?:\.\d+)?(?= s\b| [KM]iB\b)")  # times and sizes differ from run to run
_LEAST_ALIKE = 0.5


def examples(page: str) -> Iterator[tuple[str, str, str | None]]:
    """The language and the code of each example of a page, and what the page shows of its output."""
    blocks = [*_BLOCK.findall(page), ("", "")]
    for (language, code), (following, shown) in pairwise(blocks):
        if language != "text":
            yield language, code, shown if following == "text" else None


def outputs(page: str, folder: Path) -> Iterator[str]:
    """What each example prints, run in order in a folder; raises what an example raises."""
    names: dict[str, Any] = {}
    for language, code, _ in examples(page):
        printed = io.StringIO()
        if language == "python":
            with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
                exec(code, names)
        else:
            for line in code.splitlines():
                printed.write(_run(line, folder))
        yield printed.getvalue()


def _run(line: str, folder: Path) -> str:
    module = line.replace("tlcapture", f"{sys.executable} -m tlcapture", 1)
    path = os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        module, cwd=folder, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise SystemExit(f"{line}: {done.stderr}")
    return done.stdout


def shown_now(shown: str, printed: str) -> str:
    """What a page shows of an output, with its lines in place of the older ones that are most like them."""
    lines, found, start = [line.rstrip() for line in printed.splitlines()], [], 0
    for line in shown.splitlines():
        if line == "..." or not line:
            found.append(line)
            continue
        is_cut, known = line.endswith(" ..."), line.removesuffix(" ...")
        alike = [_likeness(known, each[: len(known)] if is_cut else each) for each in lines[start:]]
        if not alike or max(alike) < _LEAST_ALIKE:
            raise SystemExit(f"nothing like {line!r} is printed any more:\n{printed}")
        start += alike.index(max(alike)) + 1
        now = lines[start - 1]
        is_same = now.startswith(known) if is_cut else _MEASURED.sub("", now) == _MEASURED.sub("", line)
        found.append(line if is_same else _cut(now, known) if is_cut else now)
    return "\n".join(found) + "\n"


def _cut(line: str, known: str) -> str:
    return line if len(line) <= len(known) else line[: len(known)].rsplit(" ", 1)[0] + " ..."


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def page_now(page: str, folder: Path) -> str:
    """A page with what its examples print now."""
    new = page
    for (_, code, shown), printed in zip(examples(page), outputs(page, folder), strict=True):
        if shown is not None:
            now = shown_now(shown, printed)
            new = new.replace(f"```text\n{shown}```", f"```text\n{now}```", 1)
            click.echo(f"{code.splitlines()[-1]}\n{now}")
    return new


@click.command()
@click.option("--check", is_flag=True, help="Only say which pages show something else.")
@click.argument("pages", nargs=-1)
def main(check: bool, pages: tuple[str, ...]) -> None:
    """Run the examples of pages below docs/, and write their outputs and pictures."""
    outdated = []
    for name in pages or PAGES:
        path = DOCS / name
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            new = page_now(page, Path(folder))
            for picture in () if check else [each for each, of in PICTURES.items() if of == name]:
                shutil.copy(Path(folder) / picture, DOCS / "pictures" / picture)
        if check and new != page:
            outdated.append(f"docs/{name} shows other outputs: run 'make examples'")
        elif not check:
            path.write_text(new, encoding="utf-8")
    if outdated:
        raise SystemExit("\n".join(outdated))


if __name__ == "__main__":
    main()
