"""Locks between processes, for work that two runs must not do at the same time.

The operating system releases a lock when its process ends, however it ends, so no stale locks remain.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tlcapture.errors import InputError, StorageError
from tlcapture.storage.regular_files import in_place_of_folder
from tlcapture.storage.remote.locks import held, remotely_locked
from tlcapture.storage.remote.roots import refresh, store_of

_log = logging.getLogger(__name__)
_FRESH = 30.0  # seconds for which a listing of a remote experiment is current, unless the run waited for another
_POLL = 0.1  # seconds between two tries


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file; `False` if there is no such file.

    On a file system without locks, where this cannot be known, tells whether the file exists.
    """
    try:
        import fcntl
    except ImportError:
        return path.exists()
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, ValueError):  # no file can have a name with a null character
        return False
    except OSError:
        return True
    return False


def holder(path: Path) -> str | None:
    """The holder of a lock in a remote root, as text; `None` for any other lock."""
    remote = store_of(path)
    found = None if remote is None else held(*remote)
    return None if found is None else str(found[0])


@contextmanager
def presence(folder: Path) -> Iterator[Path]:
    """A hidden temporary file in a folder, whose lock `is_held` while this process is there; it holds its own name.

    Raises `InputError` if the folder cannot be written to.
    """
    path = folder.resolve() / f".tlcapture-{secrets.token_hex(16)}"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
            path.write_text(path.name)
        except (OSError, StorageError) as error:
            raise InputError(f"{folder}: cannot be written to: {getattr(error, 'strerror', None) or error}") from None
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file; yields whether another process held it first. In a remote root the lock is an object.

    On a file system without locks, nothing is locked: files are still written completely, but of two runs at the same
    time the later one may overwrite the files of the other.

    Args:
        path: the lock file, which is created if needed and not removed.
        on_wait: called once if another process holds the lock.

    Raises:
        StorageError: the lock file cannot be created or locked.
    """
    if (remote := store_of(path)) is not None:
        with remotely_locked(*remote, on_wait) as waited:
            experiment = next(each.parent for each in path.parents if each.name == ".locks")
            refresh(experiment, 0.0 if waited else _FRESH)
            yield waited
        return
    lock = FileLock(path, mode=0o666)
    waited = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            on_wait()
            lock.acquire(poll_interval=_POLL)
    except NotImplementedError:
        _log.warning(
            "%s: this file system has no locks: do not run two commands that write here at the same time", path
        )
    except OSError as error:
        reason = in_place_of_folder(path.parent) or error.strerror or error
        raise StorageError(f"{path}: cannot be locked: {reason}") from None
    try:
        yield waited
    finally:
        lock.release()
