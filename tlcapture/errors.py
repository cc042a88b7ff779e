"""The errors that tlcapture raises itself.

Every message is one line that states what was expected, what was found and what to do. The library raises
them; only the command line turns them into an exit status (`exit_code`).
"""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import traceback
import warnings
from pathlib import Path

from tlcapture.folder_names import named

_PACKAGE = str(Path(__file__).parent)


def warn_user(text: str) -> None:
    """Warn, naming the innermost line that is neither in this package nor in an installed one: the user's own."""
    here = frame = inspect.currentframe()
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    found = frame or here
    if found is None:
        warnings.warn(text, stacklevel=2)
    else:
        registry = found.f_globals.setdefault("__warningregistry__", {})
        name = found.f_globals.get("__name__", "")
        warnings.warn_explicit(text, UserWarning, found.f_code.co_filename, found.f_lineno, name, registry)


class TlcaptureError(Exception):
    """Base class of all errors. Exit status 1: the request was valid, but failed.

    Example:
        try:
            cap.project("behavioral/refusals")
        except TlcaptureError as error:
            print(error)
    """

    exit_code = 1

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in named(super().__str__()))

    def _render_traceback_(self) -> list[str]:
        """The traceback in IPython and notebooks: the user's own lines that led here, and the message, in one line."""
        lines = []
        for frame in traceback.extract_tb(self.__traceback__):
            if _is_users(frame.filename):
                lines.append(f"{_place(frame.filename)}, line {frame.lineno}")
                lines.append(f"    {linecache.getline(frame.filename, frame.lineno or 0).strip()}")
        return [*lines, f"{type(self).__name__}: {self}"]


def _is_users(path: str) -> bool:
    """Whether a file is neither of this package nor of one that is installed, nor of Python itself."""
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    shell = getattr(sys.modules.get("IPython"), "__path__", [])  # also where it was installed elsewhere
    others = (_PACKAGE, "<frozen", "<@", str(Path(traceback.__file__).parent), *shell)
    return not (installed or path.startswith(others))


def _place(path: str) -> str:
    """A file's name as IPython shows it: `Cell In[3]` for a cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    label = None if shell is None else shell.compile.format_code_name(path)
    return f"File {path}" if label is None else " ".join(label)


class InputError(TlcaptureError):
    """The request itself is invalid: an option, a name, a prompt set, a config file. Exit status 2."""

    exit_code = 2


class ModelError(InputError):
    """A model cannot be loaded, or an engine does not cover its architecture."""


class StorageError(TlcaptureError):
    """A file cannot be read or written, or its content does not match its format."""


def refused_path(error: OSError) -> StorageError:
    """The error for a path that the operating system refused, as of a folder that may not be opened.

    Raises the error itself where it names no path.
    """
    if not isinstance(error.filename, str | bytes):
        raise error
    return StorageError(f"{os.fsdecode(error.filename)}: {error.strerror or error}")


class NoSpaceError(StorageError):
    """A device can no longer be written to: it is full, a quota is used up, it is read-only, or the run has ended.

    It ends a run, because further results could not be saved.
    """


class VectorError(TlcaptureError):
    """A trait vector is missing or malformed, or does not fit the activations to be projected."""


class NotKeptError(VectorError):
    """A capture does not keep the activations that a vector at a layer projects."""

    def __init__(self, message: str, layer: int = -1):  # pickle passes the message alone, and sets `layer` afterwards
        super().__init__(message)
        self.layer = layer


class NumericalError(TlcaptureError):
    """NaN or inf where a finite number was expected, or a value that its storage dtype cannot hold."""


class ClusterError(TlcaptureError):
    """The workers of a cluster failed, or cannot be started."""


class OutOfMemoryError(TlcaptureError):
    """A single prompt or example does not fit in memory."""
