"""The temporary files that other files are first written to; the name of each tells whose it is."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from tlcapture.errors import StorageError
from tlcapture.storage.folders import stems_in
from tlcapture.storage.remote.working_copies import HOST, is_running

_LONGEST = 255  # bytes of a file's name
_TEMPORARY = re.compile(rf"\..+\.{re.escape(HOST)}\.(\d+)\.[0-9a-f]+\.tmp")


def temporary_path(path: Path) -> Path:
    """A new temporary path of this process next to a path, with as much of its name as file systems allow."""
    ending = f".{writer()}.{secrets.token_hex(4)}.tmp"
    name = os.fsencode(path.name)[: _LONGEST - len(ending) - 1].decode(errors="ignore")
    return path.with_name(f".{name}{ending}")


def writer() -> str:
    """The name of this process in the names of its temporary files; processes of other machines have others."""
    return f"{HOST}.{os.getpid()}"


def sweep_temporaries(folder: Path) -> None:
    """Remove temporary files in `folder` that killed processes of this machine left behind.

    Those of running processes are kept, and those of other machines that share the folder.
    """
    for path in [folder / f"{stem}.tmp" for stem in stems_in(folder, ".tmp")]:
        match = _TEMPORARY.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            _remove_temporary(path)


@lru_cache(maxsize=2**14)
def sweep_once(folder: Path) -> None:
    """Sweep a folder in which this process has not done so yet, if it may be listed."""
    with suppress(StorageError):
        sweep_temporaries(folder)


def remove_temporaries(folder: Path, writers: Iterable[str]) -> None:
    """Remove the temporary files of some writers in a folder and below it, whether or not these still run."""
    parts = [f".{each}." for each in writers]
    for path in folder.rglob(".*.tmp"):
        if any(part in path.name for part in parts):
            _remove_temporary(path)


def _remove_temporary(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)
