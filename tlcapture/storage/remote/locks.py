"""Locks in an object store: an object that says who holds the lock, written only if there is none.

The holder rewrites it every few seconds while it runs. If it is not rewritten for a minute, or its process
on this machine has ended, another run takes the lock over, by a write that replaces the version it has seen. A store
without conditional writes has no locks: `remote_roots.check_writable` says so.
"""

from __future__ import annotations

import getpass
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from time import monotonic, sleep

import orjson

from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.storage.remote.object_stores import Store, Version
from tlcapture.storage.remote.working_copies import HOST, is_running

_log = logging.getLogger(__name__)
_BEAT = 15.0  # seconds between two writes of the holder
_STALE = 60.0  # seconds without one
_POLL = 1.0


def _user() -> str:
    with suppress(Exception):
        return getpass.getuser()
    return "unknown"


@dataclass(frozen=True)
class Holder:
    """The holder of a lock; `beat` counts how often it was written."""

    host: str = HOST
    process: int = field(default_factory=os.getpid)
    user: str = field(default_factory=_user)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.process} of {self.user} on {self.host}, since {self.since}"

    @property
    def has_ended(self) -> bool:
        """Whether the holder was a process of this machine that has ended."""
        return self.host == HOST and not is_running(self.process)

    def to_json(self) -> bytes:
        """The content of the object."""
        return orjson.dumps(asdict(self))


@contextmanager
def remotely_locked(store: Store, name: str, on_wait: Callable[[], object]) -> Iterator[bool]:
    """Hold the lock of a name; yields whether another run held it first.

    `on_wait` is called once if another run holds it.

    Raises `StorageError` if the lock cannot be written.
    """
    own = Holder()
    waited = _acquire(store, name, own, on_wait)
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(store, name, own, ended), daemon=True)
    keeper.start()
    try:
        yield waited
    finally:
        ended.set()
        keeper.join()
        with suppress(TlcaptureError):  # it becomes stale
            found = held(store, name)
            if found is not None and found[0].token == own.token:
                store.remove(name)


def _acquire(store: Store, name: str, own: Holder, on_wait: Callable[[], object]) -> bool:
    seen: tuple[str, int] | None = None
    since, waited = monotonic(), False
    while not store.create(name, own.to_json()):
        found = held(store, name)
        if found is None:
            continue
        holder, version = found
        if (holder.token, holder.beat) != seen:
            seen, since = (holder.token, holder.beat), monotonic()
        if holder.has_ended or monotonic() - since > _STALE:
            _log.warning("%s/%s: %s has ended without releasing the lock", store.url, name, holder)
            if store.replace(name, own.to_json(), version):
                break
            continue
        if not waited:
            on_wait()
        waited = True
        sleep(_POLL)
    return waited


def held(store: Store, name: str) -> tuple[Holder, Version] | None:
    """The holder of a lock, and the version of the object that names it."""
    version, content = store.version(name), store.read(name)
    if version is None or content is None:
        return None
    try:
        return Holder(**orjson.loads(content)), version
    except (TypeError, ValueError):
        raise StorageError(f"{store.url}/{name}: not a lock: remove it") from None


def _keep(store: Store, name: str, own: Holder, ended: threading.Event) -> None:
    """Rewrite the lock at intervals; stops, with a warning, if another run has taken it."""
    beat = own
    while not ended.wait(_BEAT):
        beat = replace(beat, beat=beat.beat + 1)
        try:
            found = held(store, name)
            if found is None or found[0].token != own.token or not store.replace(name, beat.to_json(), found[1]):
                _log.warning("%s/%s: another run has taken this lock", store.url, name)
                return
        except TlcaptureError as error:  # until the next time
            _log.warning("%s", error)
