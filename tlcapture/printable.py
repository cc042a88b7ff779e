"""Text from outside, made fit to be seen: what a model wrote must steer neither a terminal nor a page.

>>> printable("one\\ntwo\\x1b[2J")
'one⏎two�[2J'
"""

from __future__ import annotations

NEWLINE = "\u23ce"


def printable(text: str) -> str:
    """The text without control characters; a newline shows as a mark."""
    return "".join(c if c.isprintable() else {"\n": NEWLINE, "\t": " "}.get(c, "\ufffd") for c in text)
