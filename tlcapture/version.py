"""The version of this package, and those of the packages that it uses."""

from __future__ import annotations

from functools import cache

__version__ = "0.2.0"


@cache
def installed(package: str) -> str:
    """The version of an installed package, read once; raises `importlib.metadata.PackageNotFoundError`."""
    from importlib.metadata import version

    return version(package)
