"""Roots that are not a local disk, such as `s3://bucket/prefix`.

    root = root_folder("s3://bucket/prefix")     # a local folder, which all other modules use as any root

The folder is a working copy for this process. Each object is there as a file of its size and time without content,
until a reader asks for it (`local`): then it is downloaded, once for each version, into a cache that processes share.
A written file goes to the store by one request (`publish`) before it appears in the folder. Objects that others write
appear when the folder is brought up to date (`refresh`). For local roots all functions here do nothing.

This module loads no fsspec before a root is a URL.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from atexit import register
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tlcapture.errors import InputError, StorageError
from tlcapture.folder_names import name_folder
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.regular_files import is_folder
from tlcapture.storage.remote.object_stores import Store, checked_url, is_url
from tlcapture.storage.remote.working_copies import Mount, new_copy

FRESH = 5.0  # seconds for which the listing of a remote root counts as current
_ATTACHED = "TLCAPTURE_WORKING_COPIES"  # of the process that started this one
_INCOMPLETE = ".incomplete"
_mounts: dict[str, Mount] = {}  # by folder
_mounting = threading.Lock()


def root_folder(root: str | Path) -> Path:
    """The folder of a root: its own, or for a URL the working copy, which is made at the first call.

    Raises:
        InputError: no such bucket, no credentials, or a package is missing; no such user, of `~user`.
        StorageError: the store cannot be reached, or does not allow listing.
    """
    if not is_url(root):
        folder = Path(root)
        if not str(root).startswith("~"):
            return folder.absolute() if str(folder).startswith("~") else folder  # of ./~name, Path keeps ~name
        try:
            return folder.expanduser()
        except RuntimeError:
            raise InputError(f"{root}: no home folder is known: write ./{root} for a folder of that name") from None
    scheme, url = checked_url(root)
    if scheme == "file":
        return Path(f"/{url.removeprefix('file://')}")
    with _mounting:
        own = [mount for mount in _mounts.values() if mount.is_owner and mount.store.url == url]
        return (own[0] if own else _mounted(url)).folder


def url_of(path: Path) -> str | None:
    """The URL of a path in the working copy of a remote root; `None` for any other path."""
    mount, name = _found(path)
    return None if mount is None else f"{mount.store.url}/{name}".rstrip("/")


def is_remote(path: Path) -> bool:
    """Whether a path is in a remote root."""
    return _found(path)[0] is not None


def shown(root: Path) -> str:
    """A root as it is named on the command line."""
    return url_of(root) or str(root)


def check_local(path: Path | None, option: str) -> None:
    """Raise `InputError` where an option that takes a local path was given a URL."""
    if path is not None and is_url(path):
        raise InputError(f"{option} {path}: expected a local path: only --root can be a URL")


def local(path: Path) -> Path:
    """Return the path, after downloading the file's content if it is an object's."""
    mount, name = _found(path)
    if mount is not None:
        mount.fetch(name, path)
    return path


def publish(temporary: Path, path: Path) -> bool:
    """Move a finished file to the object of `path` in a remote root; returns `False` for any other path."""
    mount, name = _found(path)
    if mount is not None:
        mount.publish(temporary, name)
    return mount is not None


def publish_folder(folder: Path) -> None:
    """Write all files of a folder that was moved into a remote root; until the last is written, it `is_incomplete`."""
    mount, name = _found(folder)
    if mount is None:
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    mount.store.create(f"{name}/{_INCOMPLETE}", b"")
    try:
        for path in files:
            publish(path, path)
    except BaseException:
        with suppress(StorageError):
            discard_folder(folder)
        raise
    mount.store.remove(f"{name}/{_INCOMPLETE}")


def is_incomplete(folder: Path) -> bool:
    """Whether `publish_folder` is writing a folder of a remote root, or was killed while it did."""
    return is_remote(folder) and (folder / _INCOMPLETE).exists()


def check_complete(folder: Path) -> None:
    """Raise `InputError` for a folder that `is_incomplete`."""
    if is_incomplete(folder):
        raise InputError(f"{folder}: its import is not complete: if it was stopped, import it again")


def discard_folder(folder: Path) -> None:
    """Remove all objects below a folder of a remote root, and the folder of the working copy."""
    mount, name = _found(folder)
    if mount is not None:
        for each in sorted(mount.store.objects(name), key=lambda each: each.endswith(_INCOMPLETE)):
            mount.store.remove(each)
        mount.refresh(name)
        shutil.rmtree(folder, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove the object of a path in a remote root, before its file is removed."""
    mount, name = _found(path)
    if mount is not None:
        mount.discard(name)


def refresh(folder: Path, older_than: float = 0.0) -> Path:
    """Return the folder, brought up to date if it was last listed more than `older_than` seconds ago."""
    mount, name = _found(folder)
    if mount is not None:
        mount.refresh(name, older_than)
    return folder


def list_experiment(root: Path, experiment: str) -> None:
    """List the files of an experiment into the working copy, unless that was done before."""
    if _mounts and (mount := _mounts.get(str(root))) is not None:
        mount.list_once(f"experiments/{experiment}")


def store_of(path: Path) -> tuple[Store, str] | None:
    """The store of a path in a remote root, and the path's name in it."""
    mount, name = _found(path)
    return None if mount is None else (mount.store, name)


def check_writable(folder: Path) -> str | None:
    """Write and remove an object in a remote folder; returns a warning for a store without conditional writes.

    Raises `StorageError` if nothing can be written. Of a local folder that is not there, the one above it is asked.
    """
    found = store_of(folder)
    if found is None:
        is_folder(folder)
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StorageError(f"{existing}: cannot be written to")
        return None
    store, name = found[0], f"{found[1]}/.locks/{secrets.token_hex(8)}.test"
    try:
        store.create(name, b"")
        has_conditions = not store.create(name, b"")
    finally:
        with suppress(StorageError):
            store.remove(name)
    if has_conditions:
        return None
    return (
        f"{store.url}: this store has no conditional writes, so runs do not wait for each other: let one run at a time"
    )


def in_other_processes() -> Mapping[str, str]:
    """The environment in which a process that this one starts uses the same working copies."""
    return {_ATTACHED: json.dumps({folder: mount.store.url for folder, mount in _mounts.items()})} if _mounts else {}


def _found(path: Path) -> tuple[Mount | None, str]:
    """The working copy that contains a path, and the path's name in it; `None` for temporary files and folders."""
    if _mounts:
        text = str(path)
        for folder, mount in _mounts.items():
            if text.startswith(folder) and text[len(folder) :][:1] in ("", "/"):
                name = text[len(folder) + 1 :]
                is_temporary = any(part.startswith(".") and part.endswith(".tmp") for part in name.split("/"))
                return (None, "") if is_temporary else (mount, name)
    return None, ""


def _mounted(url: str) -> Mount:
    """A new working copy that lists the root's objects; it is removed when this process ends."""
    try:
        folder = new_copy(cache_folder())
    except OSError as error:
        place = f"{error.filename or cache_folder()}: {error.strerror}"
        raise StorageError(
            f"{url}: no working copy can be made ({place}): set TLCAPTURE_CACHE to another folder"
        ) from None
    register(_remove, folder.parent, os.getpid())
    try:
        mount = Mount(folder, url, is_owner=True)
        mount.refresh("")
    except BaseException:
        _remove(folder.parent, os.getpid())
        raise
    name_folder(str(folder), url)
    _mounts[str(folder)] = mount
    return mount


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


for _folder, _url in json.loads(os.environ.get(_ATTACHED) or "{}").items():
    _mounts[_folder] = Mount(Path(_folder), _url, is_owner=False)
    name_folder(_folder, _url)
