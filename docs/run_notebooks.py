"""Run the notebooks of docs/notebooks and store their outputs: `make notebooks`.

python -m docs.run_notebooks
"""

from __future__ import annotations

import ast
import base64
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"

Output = dict[str, Any]


def code_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(notebook: Mapping[str, Any]) -> Iterator[list[Output]]:
    """The outputs of each code cell, run in order with names of their own; raises what a cell raises."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            value = _run("".join(cell["source"]), names)
        outputs: list[Output] = []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
        if value is not None:
            data = {kind: text.splitlines(keepends=True) for kind, text in _shown(value).items()}
            outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
        yield outputs


def _run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; its value is that of a last line which is an expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if isinstance(last, ast.Expr) else None


def _shown(value: Any) -> dict[str, str]:
    """What a notebook shows of a value, without scripts: a figure is a picture."""
    from matplotlib.figure import Figure

    from tlcapture.explore.figures.offline_figure import OfflineFigure

    if isinstance(value, Figure | OfflineFigure):
        save = value.savefig if isinstance(value, Figure) else value.save
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figure.png"
            save(path)
            return {"image/png": base64.b64encode(path.read_bytes()).decode(), "text/plain": "a figure"}
    html = getattr(value, "_repr_html_", lambda: None)()
    return {**({"text/html": html} if html else {}), "text/plain": repr(value)}


def main() -> None:
    """Store the outputs of every notebook."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for number, (cell, outputs) in enumerate(zip(code_cells(notebook), executed(notebook), strict=True), 1):
            cell.update(outputs=outputs, execution_count=number)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(FOLDER.parents[1]))


if __name__ == "__main__":
    main()
