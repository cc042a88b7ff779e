"""The errors tlcapture raises on purpose.

Every message is one line that says what was expected, what came and what to do. The library raises
them; only the command line turns them into an exit status (`exit_code`).
"""

from __future__ import annotations


class TlcaptureError(Exception):
    """Base of every error that is raised on purpose. Exit status 1: the work was asked for rightly."""

    exit_code = 1


class InputError(TlcaptureError):
    """The request itself is wrong: an option, a name, a prompt set, a config file. Exit status 2."""

    exit_code = 2


class ModelError(InputError):
    """A model cannot be loaded, or an engine does not cover its architecture."""


class StorageError(TlcaptureError):
    """A file cannot be read or written, or does not hold what its format says."""


class NoSpaceError(StorageError):
    """Nothing more can be written in a place: the device is full, a quota is used up, or it is read-only.

    A run ends with it: what it would do next could not be kept.
    """


class VectorError(TlcaptureError):
    """A trait vector is missing, malformed, or does not fit the activations it is asked to project."""


class NumericalError(TlcaptureError):
    """NaN or inf where a number was expected, or a value that its storage dtype cannot hold."""


class ClusterError(TlcaptureError):
    """The workers of a cluster cannot do their work."""


class OutOfMemoryError(TlcaptureError):
    """Something does not fit in memory even on its own."""
