"""The page's static files and Plotly's script, for the server and for exported pages."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

STATIC = files("tlcapture.page") / "static"
SCRIPTS = (
    "state.js",
    "source.js",
    "elements.js",
    "colours.js",
    "picker.js",
    "figure.js",
    "strip.js",
    "work.js",
    "notes.js",
    "overview.js",
    "dynamics.js",
    "layers.js",
    "lens.js",
    "attention.js",
    "attention_token.js",
    "attention_matrix.js",
    "attention_heads.js",
    "internals.js",
    "vectors.js",
    "compare.js",
    "difference.js",
    "main.js",
)
_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}
_SCRIPTS_HERE, _STYLE_HERE = "<!-- scripts -->", "<!-- style -->"
_POLICY_HERE, _DATA_HERE = "<!-- policy -->", "<!-- data -->"

# Plotly inserts styles at run time, so inline styles are allowed; inline scripts are not.
_REST = "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'"
POLICY = f"default-src 'none'; script-src 'self'; connect-src 'self'; frame-ancestors 'none'; {_REST}"


@cache
def plotly_script() -> bytes:
    """Plotly's JavaScript, from the Python package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).encode("utf-8")


def static_file(name: str) -> tuple[bytes, str] | None:
    """The content and media type of a static file of the page; `None` for any other name."""
    suffix = name[name.rfind(".") :]
    if suffix not in _MEDIA_TYPES or name not in (*SCRIPTS, "style.css"):
        return None
    return (STATIC / name).read_bytes(), _MEDIA_TYPES[suffix]


@cache
def served_page() -> str:
    """The page's HTML, which refers to its scripts and style sheet by URL."""
    tags = "\n".join(f'<script src="static/{name}" defer></script>' for name in SCRIPTS)
    page = _template().replace(_POLICY_HERE, "").replace(_DATA_HERE, "")
    page = page.replace(_STYLE_HERE, '<link rel="stylesheet" href="static/style.css">')
    return page.replace(_SCRIPTS_HERE, tags)


def exported_page(data: str) -> str:
    """The page's HTML with style sheet, scripts, Plotly and `data` inlined; `data` must not contain scripts.

    Its content security policy allows only these scripts, and no requests.
    """
    scripts = [plotly_script().decode("utf-8"), *((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    scripts = [script.replace("</script", "<\\/script") for script in scripts]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; {_REST}"
    page = _template().replace(_POLICY_HERE, f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    page = page.replace(_STYLE_HERE, f"<style>\n{style}</style>").replace(_DATA_HERE, data)
    return page.replace(_SCRIPTS_HERE, "\n".join(f"<script>{script}</script>" for script in scripts))


def _template() -> str:
    return (STATIC / "index.html").read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
