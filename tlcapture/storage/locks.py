"""Locks between processes: what two runs must not do at once, they do one after the other.

The operating system lets go of a lock when its process ends, however it ends, so that none stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tlcapture.errors import StorageError
from tlcapture.logger import get_logger

_log = get_logger(__name__)
_POLL = 0.1  # seconds between two tries


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file; yields whether another process held it first.

    `on_wait` is called once if it does. A file system without locks is used without: what is written
    there is whole all the same, but of two runs at once the later one may win.
    """
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
        _log.warning("%s: this file system has no locks: do not let two runs write here at once", path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be locked: {error.strerror or error}") from None
    try:
        yield waited
    finally:
        lock.release()
