"""Log messages of the package: whoever imports it decides what is shown."""

from __future__ import annotations

import logging

logging.getLogger("tlcapture").addHandler(logging.NullHandler())


def get_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)
