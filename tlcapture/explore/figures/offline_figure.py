"""Plotly figures that load nothing from other hosts.

Plotly's own display loads MathJax, and in some front ends Plotly itself, from a content delivery network. Captures
may be confidential and cluster nodes are often offline, so these figures embed everything they need.
"""

from __future__ import annotations

import json
import tempfile
import webbrowser
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from tlcapture.errors import InputError
from tlcapture.explore.figures.static_figure import picture
from tlcapture.storage.files import write_bytes
from tlcapture.text import counted

_MIME = "application/vnd.plotly.v1+json"
# Plotly renderers of front ends that draw figures themselves, and of those that need HTML.
_TAKES_DATA = {
    "plotly_mimetype",
    "jupyterlab",
    "nteract",
    "vscode",
}
_TAKES_HTML = {"notebook", "notebook_connected", "kaggle", "azure", "colab", "cocalc", "databricks"}


def plotly_text(text: str) -> str:
    """`text`, escaped so that Plotly shows it unchanged instead of parsing tags and formulas."""
    return escape(text, quote=False).replace("$", "&#36;")


class OfflineFigure(go.Figure):
    """A Plotly figure that loads nothing from other hosts; all methods of `plotly.graph_objects.Figure` work.

    Example:
        figure = cap.plot.trajectory("behavioral/refusal")
        figure.update_layout(width=900)
        figure.show()
    """

    def __repr__(self) -> str:
        title = self.layout.title.text or "untitled"
        ways = ".show() opens it, .save(path) saves it as .html, .png or .svg"
        return f"<Plotly figure {title!r}, {counted(len(self.data), 'trace')}: {ways}>"

    def show(self, *args: Any, **options: Any) -> None:
        """Show the figure in the notebook, or in a browser outside of one. Arguments are passed on to Plotly."""
        if args or options:
            super().show(*args, **options)
        elif not self._display():
            with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False, encoding="utf-8") as file:
                file.write(self.to_html())
            if not webbrowser.open(Path(file.name).as_uri()):
                print(f"cannot open a browser: the figure is in {file.name}")

    def save(self, path: str | Path) -> Path:
        """Save the figure as an HTML page or a PNG or SVG picture, depending on the suffix; returns the path.

            figure.save("trajectory.svg")

        Pictures are drawn by Matplotlib and need no browser. Raises `InputError` for another suffix.
        """
        path = Path(path).expanduser()
        form = path.suffix.lower().removeprefix(".")
        if form not in ("html", "png", "svg"):
            raise InputError(f"{path.name}: expected a name that ends in .html, .png or .svg")
        write_bytes(path, str(self.to_html()).encode() if form == "html" else picture(self, form))
        return path

    def _display(self) -> bool:
        """Display the figure if this is a notebook; returns whether it is."""
        renderers = set((pio.renderers.default or "").split("+"))
        if not renderers & (_TAKES_DATA | _TAKES_HTML):
            return False
        from IPython.display import display

        # Where a notebook is shown without a front end that draws figures, on GitHub or by nbconvert, the PNG is.
        static = {"image/png": b64encode(picture(self, "png")).decode(), "text/plain": repr(self)}
        drawn = {_MIME: json.loads(self.to_json())} if renderers & _TAKES_DATA else {"text/html": self._repr_html_()}
        display({**drawn, **static}, raw=True)
        return True

    def _ipython_display_(self) -> None:
        if not self._display():
            print(repr(self))  # in a terminal, only `show` opens a browser

    def _repr_html_(self) -> str:
        return str(self.to_html(full_html=False))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> dict[str, Any]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}
