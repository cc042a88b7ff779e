"""The working copy of a remote root on this machine, and the cache of versions that processes share.

cache/remote/copies/{host}-{process}-{random}/root         a file for each object, without content until it is read
cache/remote/versions/{key}                               the content of objects, the least used removed first
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import stat
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from math import inf
from pathlib import Path
from time import monotonic, time_ns

from tlcapture.errors import InputError, StorageError, TlcaptureError
from tlcapture.storage.remote.object_stores import Store, Version
from tlcapture.text import parse_bytes

_log = logging.getLogger(__name__)
_LIMIT = "TLCAPTURE_REMOTE_CACHE"  # the most bytes of remote roots that are kept on this machine
_DEFAULT_LIMIT = "10GiB"
_SMALL, _TOGETHER = 2**19, 64  # bytes and number of files that are downloaded before they are asked for
_IN_USE = 60.0  # seconds for which a requested file is kept
_EMPTY, _FULL = 0o201, 0o601  # permissions that tell whether a file of a working copy has its content, and is one
_SHARE = 20  # times as long as a listing took, it counts as current
_LISTED_AT_ROOT = ("datasets", "experiments", "tlcapture.toml")
# The scope of process numbers: this machine, or the container on it.
HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
with suppress(OSError):
    HOST += f"-{os.stat('/proc/self/ns/pid').st_ino}"


class Mount:
    """The working copy of a remote root. `is_owner` tells whether this process made it."""

    def __init__(self, folder: Path, url: str, *, is_owner: bool):
        self.folder, self.store, self.is_owner = folder, Store(url), is_owner
        self._cache = _Cache(folder.parents[2] / "versions")
        self._staging = folder.parent / "staging"
        self._versions: dict[str, Version] = {}
        self._changed_at: dict[str, float] = {}  # when this process last wrote or removed an object
        self._listed: dict[str, tuple[float, float]] = {}  # when a listing began, and how long it took
        self._with_content: OrderedDict[str, tuple[int, float]] = OrderedDict()  # size, and when it was asked for
        self._n_bytes = 0  # of all these files
        self._read_last = ""  # the folder of the file that was last downloaded
        self._not_yet_looked_at: dict[str, deque[str]] = {}  # names, by folder
        self._looking_ahead = threading.Lock()
        self._lock = threading.RLock()
        self._of_name: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def refresh(self, below: str, older_than: float = 0.0) -> None:
        """Bring everything below a path up to date; for the root, everything that has been listed so far."""
        for each in [below] if below else dict.fromkeys([*_LISTED_AT_ROOT, *self._listed]):
            listed, took = self._listed.get(each, (-inf, 0.0))
            if monotonic() - listed >= max(older_than, _SHARE * took if older_than else 0.0):
                self._refresh(each)

    def list_once(self, below: str) -> None:
        """List everything below a path, unless it was listed before."""
        if below not in self._listed:
            self._refresh(below)

    def _refresh(self, below: str) -> None:
        began = monotonic()
        if below == "experiments":
            for name in self.store.folders(below):
                (self.folder / below / name).mkdir(parents=True, exist_ok=True)
        else:
            self._update(below, self.store.objects(below), began)
        self._listed[below] = (began, monotonic() - began)

    def _update(self, below: str, found: Mapping[str, Version], began: float) -> None:
        """Update the working copy below a path from a listing that began at a given time."""
        with self._lock:
            for name, version in found.items():
                if self._versions.get(name) != version and self._changed_at.get(name, -1.0) < began:
                    self._put_placeholder(name, version)
            gone = [name for name in self._versions if f"{name}/".startswith(f"{below}/") and name not in found]
            for name in gone:
                if self._changed_at.get(name, -1.0) < began:
                    del self._versions[name]
                    (self.folder / name).unlink(missing_ok=True)

    def fetch(self, name: str, path: Path) -> None:
        """Download the content of an object into its file."""
        while _is_empty(path):
            with self._of_name[name]:
                if _is_empty(path):
                    self._fetch(name, path)

    def _fetch(self, name: str, path: Path) -> None:
        version = self._versions.get(name) or self.store.version(name)
        if version is not None and not self._cache.holds(self._cache_key(name, version)):
            self._look_ahead(name)
        while version is not None and not self._cache.holds(self._cache_key(name, version)):
            new = self._new_path()
            try:
                self.store.download(name, new)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
            before, version = version, self.store.version(name)
            if before == version:
                self._cache.add(self._cache_key(name, version), new, version.written)
            else:  # it was replaced meanwhile
                new.unlink()
        with self._lock:
            if version is None:
                self._versions.pop(name, None)
                path.unlink(missing_ok=True)
                raise StorageError(f"{path}: no such file: another run has removed it")
            self._versions[name] = version
            new = self._new_path()
            if self._cache.link(self._cache_key(name, version), new):
                new.replace(path)
                self._forget_content(name)
                self._with_content[name] = (version.size, monotonic())
                self._n_bytes += version.size
            self._drop_oldest()

    def _look_ahead(self, name: str) -> None:
        """Download the small files of a folder together once a second one is requested: few readers want just two."""
        folder = name.rpartition("/")[0]
        before, self._read_last = self._read_last, folder
        if before != folder or not self._looking_ahead.acquire(blocking=False):
            return
        try:
            if folder not in self._not_yet_looked_at:
                self._not_yet_looked_at[folder] = deque(sorted(os.listdir(self.folder / folder)))
            self._download_small(folder, self._not_yet_looked_at[folder])
        except TlcaptureError as error:  # raised again for whoever reads one of them
            _log.info("%s", error)
        finally:
            self._looking_ahead.release()

    def _download_small(self, folder: str, names: deque[str]) -> None:
        wanted: dict[str, Version] = {}
        while names and len(wanted) < _TOGETHER:
            name = f"{folder}/{names.popleft()}"
            version = self._versions.get(name)
            if version and version.size <= _SMALL and not self._cache.holds(self._cache_key(name, version)):
                wanted[name] = version
        if not wanted:
            return
        new = {name: self._new_path() for name in wanted}
        self.store.download_all(new)
        found = self.store.objects(folder)
        for name, version in wanted.items():
            if found.get(name) == version:
                self._cache.add(self._cache_key(name, version), new[name], version.written)
            else:
                new[name].unlink(missing_ok=True)

    def _drop_oldest(self) -> None:
        """Drop the content of the files that were requested first, if all together exceed the limit."""
        while self._n_bytes > self._cache.limit:
            name, (_, asked) = next(iter(self._with_content.items()))
            if monotonic() - asked < _IN_USE:
                return
            version = self._versions.get(name)
            self._forget_content(name)
            if version is not None:
                self._put_placeholder(name, version)

    def _forget_content(self, name: str) -> None:
        self._n_bytes -= self._with_content.pop(name, (0, 0.0))[0]

    def publish(self, temporary: Path, name: str) -> None:
        """Write a file to an object."""
        version = self.store.upload(temporary, name)
        with self._lock:
            self._changed_at[name] = monotonic()
            new = self._new_path()
            temporary.replace(new)
            self._cache.add(self._cache_key(name, version), new, version.written)
            self._put_placeholder(name, version)

    def discard(self, name: str) -> None:
        """Remove an object."""
        if (self.folder / name).exists():
            self.store.remove(name)
            with self._lock:
                self._changed_at[name] = monotonic()
                self._versions.pop(name, None)

    def _put_placeholder(self, name: str, version: Version) -> None:
        """Put a file without content in place of an object."""
        path, new = self.folder / name, self._new_path()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.truncate(descriptor, version.size)
        os.close(descriptor)
        new.chmod(_EMPTY)
        os.utime(new, (version.written, version.written))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.replace(path)
        except OSError as error:  # another object has the name of this one's folder, or the reverse
            new.unlink()
            _log.warning("%s/%s: left out: %s", self.store.url, name, error.strerror)
            return
        self._versions[name] = version
        self._forget_content(name)

    def _new_path(self) -> Path:
        return self._staging / secrets.token_hex(8)

    def _cache_key(self, name: str, version: Version) -> str:
        parts = (self.store.url, name, *map(str, version))
        return blake2b("\0".join(parts).encode(), digest_size=20).hexdigest()


class _Cache:
    """A cache of files of remote roots by their versions, up to a limit; processes share it."""

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            self.limit = parse_bytes(os.environ.get(_LIMIT) or _DEFAULT_LIMIT)
        except InputError as error:
            raise InputError(f"{_LIMIT}: {error}") from None
        self._n_added = self.limit  # bytes since it was last looked through

    def holds(self, key: str) -> bool:
        return (self._folder / key).exists()

    def add(self, key: str, new: Path, written: int) -> None:
        """Add a file, with the time at which it was written to the store."""
        new.chmod(_FULL)
        os.utime(new, ns=(time_ns(), written * 10**9))
        self._n_added += new.stat().st_size
        new.replace(self._folder / key)
        if self._n_added > self.limit // 10:
            self._n_added = 0
            self._trim(key)

    def link(self, key: str, new: Path) -> bool:
        """Give a file of the cache a second path; `False` if it is no longer there."""
        kept = self._folder / key
        try:
            os.utime(kept, ns=(time_ns(), kept.stat().st_mtime_ns))
            os.link(kept, new)
        except FileNotFoundError:
            return False
        return True

    def _trim(self, newest: str) -> None:
        """Remove the files that were not used for longest, but not the newest one."""
        kept = []
        with os.scandir(self._folder) as entries:
            for each in entries:
                with suppress(FileNotFoundError):
                    kept.append((each.stat().st_atime_ns, each.stat().st_size, each.path))
        size = sum(each for _, each, _ in kept)
        for _, n_bytes, path in sorted(kept):
            if size <= self.limit:
                return
            if os.path.basename(path) != newest:
                Path(path).unlink(missing_ok=True)
                size -= n_bytes


def is_running(process: int) -> bool:
    """Whether a process of this machine is running; a zombie is not."""
    import psutil

    try:
        return bool(psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, OverflowError):  # a number that no process can have
        return False
    except psutil.AccessDenied:
        return True


def new_copy(cache: Path) -> Path:
    """The empty folder of a new working copy of this process; removes those of processes that were killed."""
    copies = cache / "remote" / "copies"
    (cache / "remote" / "versions").mkdir(parents=True, exist_ok=True)
    for each in copies.glob(f"{HOST}-*-*"):
        number = each.name.removeprefix(f"{HOST}-").partition("-")[0]
        if number.isdecimal() and not is_running(int(number)):
            shutil.rmtree(each, ignore_errors=True)
    own = copies / f"{HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    for name in ("staging", "root"):
        (own / name).mkdir(parents=True)
    return (own / "root").resolve()


def is_copy(found: os.stat_result) -> bool:
    """Whether a file belongs to an object, so that its modification time is the store's."""
    return stat.S_IMODE(found.st_mode) in (_EMPTY, _FULL)


def _is_empty(path: Path) -> bool:
    """Whether a file of a working copy exists without content yet."""
    try:
        return stat.S_IMODE(path.stat().st_mode) == _EMPTY
    except OSError:
        return False
