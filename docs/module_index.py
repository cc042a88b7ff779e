"""The list of all modules in CONTRIBUTING.md, made from their docstrings: `make module-index`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

TOP = Path(__file__).parents[1]
PAGE = TOP / "CONTRIBUTING.md"
_BEGIN, _END = "<!-- made by docs/module_index.py -->\n", "<!-- end -->\n"
_OUTSIDE = ("benchmarks", "docs", "scripts", "tests")


def modules() -> Iterator[tuple[str, str, str]]:
    """The folder, the name and the first paragraph of the docstring of every module, in the order of their paths."""
    package = sorted((TOP / "tlcapture").rglob("*.py")) + sorted((TOP / "tlcapture" / "page" / "static").glob("*.js"))
    outside = [path for folder in _OUTSIDE for path in sorted((TOP / folder).rglob("*.py"))]
    for path in [*sorted(package, key=lambda path: (path.parent, path)), *outside]:
        if path.stem.startswith(("__", "test_")):
            continue
        place = path.relative_to(TOP / "tlcapture" if path in package else TOP)
        in_package = path in package and path.suffix == ".py"
        name = place.with_suffix("") if in_package else place
        yield place.parent.as_posix(), name.as_posix(), _summary(path)


def _summary(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".js":
        comment = text.split("\n", 2)[1]
        return comment.removeprefix("// ") if comment.startswith("// ") else ""
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())


def index() -> str:
    """The list as Markdown: a part for each folder, closed until somebody opens it."""
    parts = []
    for folder, each in groupby(modules(), key=lambda module: module[0]):
        lines = [f"- `{name}`: {summary}\n" for _, name, summary in each]
        title = "the package's root" if folder == "." else f"{folder}/"
        parts.append(f"<details><summary>{title}</summary>\n\n{''.join(lines)}\n</details>\n")
    return "\n".join(parts)


def with_index(page: str) -> str:
    """The text of CONTRIBUTING.md with the list as it should be."""
    before, rest = page.split(_BEGIN)
    return f"{before}{_BEGIN}\n{index()}\n{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_index(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
