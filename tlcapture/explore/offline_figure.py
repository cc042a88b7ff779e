"""Plotly figures that load nothing from another host, wherever they are shown.

Plotly's own display asks a content network for MathJax, and some of its fallbacks for Plotly itself. What
a capture holds is nobody else's business, and the machines of a cluster are often offline: these figures
carry all they need.
"""

from __future__ import annotations

import tempfile
import webbrowser
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

_MIME = "application/vnd.plotly.v1+json"
_TAKES_DATA = {"plotly_mimetype", "jupyterlab", "nteract", "vscode"}  # renderers of front ends that draw it themselves
_TAKES_HTML = {"notebook", "notebook_connected", "kaggle", "azure", "colab", "cocalc", "databricks"}


def plotly_text(text: str) -> str:
    """`text` as Plotly shows it unchanged: it takes tags for markup and dollars for formulas."""
    return escape(text, quote=False).replace("$", "&#36;")


class OfflineFigure(go.Figure):
    """A Plotly figure: `write_html(path)`, `update_layout(...)` and all else are Plotly's."""

    def __repr__(self) -> str:
        title = self.layout.title.text or "untitled"
        return f"<Plotly figure {title!r}, {len(self.data)} traces: .show() opens it, .write_html(path) keeps it>"

    def show(self, *args: Any, **options: Any) -> None:
        """Show the figure: in a notebook there, otherwise in a browser; a renderer that is named is Plotly's."""
        if args or options:
            super().show(*args, **options)
        elif not self._display():
            with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False, encoding="utf-8") as file:
                file.write(self.to_html())
            if not webbrowser.open(Path(file.name).as_uri()):
                print(f"no browser here: the figure is in {file.name}")

    def _display(self) -> bool:
        """Hand the figure to a notebook, if this is one."""
        renderers = set((pio.renderers.default or "").split("+"))
        if not renderers & (_TAKES_DATA | _TAKES_HTML):
            return False
        from IPython.display import display

        drawn = {_MIME: self._as_json()} if renderers & _TAKES_DATA else {"text/html": self._repr_html_()}
        display({**drawn, "text/plain": repr(self)}, raw=True)
        return True

    def _as_json(self) -> Any:
        """The figure as plain values, as a notebook stores it."""
        import orjson

        return orjson.loads(self.to_json())

    def _ipython_display_(self) -> None:
        if not self._display():
            print(repr(self))  # a terminal: opening a browser is for `show` to do

    def _repr_html_(self) -> str:
        return str(self.to_html(full_html=False))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> dict[str, Any]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}
