"""Object stores behind a URL, through fsspec: listing, whole reads and writes, and writes on a condition.

A write is one PUT, or a multipart upload that is completed by one request: an object is there whole or not at all.
Errors of the store are raised as `StorageError` and `InputError` of one line.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tlcapture.errors import InputError, NoSpaceError, StorageError, TlcaptureError
from tlcapture.text import first_line

# The stores whose writes are whole or absent, and the package that reaches each.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "memory": "fsspec",
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # `Path` makes one slash of two
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
_TAGS = ("ETag", "etag", "generation", "md5Hash", *_TIMES)
_UNREACHED = re.compile("connect|timeout|resol|endpoint|ssl", re.IGNORECASE)  # in the names of errors


class Version(NamedTuple):
    """A version of an object: its size, the second in which it was written, and the store's mark of its content."""

    size: int
    written: int
    tag: str


def is_url(text: str | Path) -> bool:
    """Whether a text is a URL, and not the path of a folder."""
    return _URL.match(str(text)) is not None


def checked_url(text: str | Path) -> tuple[str, str]:
    """The scheme of an object store's URL, and the normalised URL; raises `InputError` for any other URL."""
    match = _URL.fullmatch(str(text))
    assert match is not None
    scheme, rest = match[1].lower(), match[2].strip("/")
    url = f"{scheme}://{rest}"
    if scheme not in ("file", *PACKAGES):
        known = ", ".join(f"{each}://" for each in PACKAGES)
        raise InputError(f"{url}: {scheme}:// is not a supported store: expected {known} or a folder")
    if not rest and scheme != "file":
        raise InputError(f"{url}: expected {scheme}://BUCKET or {scheme}://BUCKET/PREFIX")
    if "@" in rest.partition("/")[0]:
        raise InputError(f"{scheme}://...: credentials do not belong in a URL: see docs/remote-roots.md")
    if {"", ".", ".."} & set(rest.split("/")) and rest:
        raise InputError(f"{url}: a part of its path is empty, '.' or '..'")
    return scheme, url


class Store:
    """The objects below a URL, by their path relative to it. Nothing is asked of the store before the first method."""

    def __init__(self, url: str):
        self.url = url

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system, and the URL's path in it."""
        scheme = self.url.partition(":")[0]
        package = PACKAGES[scheme]
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.url, use_listings_cache=False)
        except ImportError:
            raise InputError(f"{self.url}: {package} is needed to reach it: run 'pip install {package}'") from None
        except Exception as error:
            raise InputError(f"{self.url}: cannot be opened: {first_line(error)}") from None

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @property
    def is_s3(self) -> bool:
        """Whether it is Amazon's store, or one that speaks its protocol."""
        return self.url.startswith(("s3:", "s3a:"))

    def _path(self, name: str) -> str:
        base = self._opened[1].rstrip("/")
        return f"{base}/{name}" if name else base

    def objects(self, below: str) -> dict[str, Version]:
        """All objects below a path, by name."""
        start = len(self._path("")) + 1
        with self._explained(below, "listed"):
            found = self._fs.find(self._path(below), detail=True)
            return {
                path[start:]: _version(each)
                for path, each in found.items()
                if each.get("type") == "file" and _is_safe(path[start:])
            }

    def folders(self, below: str) -> list[str]:
        """The names of the folders right below a path."""
        with self._explained(below, "listed"):
            try:
                found = self._fs.ls(self._path(below), detail=True)
            except FileNotFoundError:
                return []
            names = (each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")
            return sorted(name for name in names if _is_safe(name))

    def version(self, name: str) -> Version | None:
        """The current version of an object."""
        with self._explained(name, "read"):
            try:
                found = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return _version(found) if found["type"] == "file" else None

    def download(self, name: str, to: Path) -> None:
        """Write an object to a local file."""
        with self._explained(name, "read"):
            self._fs.get_file(self._path(name), str(to))

    def download_all(self, to: Mapping[str, Path]) -> None:
        """Write objects to local files, many at a time."""
        with self._explained("", "read"):
            self._fs.get([self._path(name) for name in to], [str(path) for path in to.values()])

    def upload(self, file: Path, name: str) -> Version:
        """Write a local file to an object, whole or not at all."""
        with self._explained(name, "written"):
            self._fs.put_file(str(file), self._path(name))
        found = self.version(name)
        if found is None:
            raise StorageError(f"{self.url}/{name}: was removed while it was being written")
        return found

    def read(self, name: str) -> bytes | None:
        """The content of a small object."""
        with self._explained(name, "read"):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless one is there, in one step; returns whether it was written.

        A store that knows no such condition writes it anyway.
        """
        with self._explained(name, "written"):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except (OSError, TypeError, NotImplementedError) as error:
                if _is_refused(error):  # two at once
                    return False
                if isinstance(error, OSError) and error.errno != errno.ENOSYS:
                    raise
                self._fs.pipe_file(self._path(name), data)
            return True

    def replace(self, name: str, data: bytes, version: Version) -> bool:
        """Replace a version of an object in one step, if the store can; returns whether it was replaced."""
        with self._explained(name, "written"):
            try:
                self._fs.pipe_file(self._path(name), data, **({"IfMatch": version.tag} if self.is_s3 else {}))
            except FileNotFoundError:
                return False
            except OSError as error:
                if not _is_refused(error):
                    raise
                return False
            return True

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._explained(name, "removed"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    @contextmanager
    def _explained(self, name: str, what: str) -> Iterator[None]:
        place = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except TlcaptureError:
            raise
        except Exception as error:
            raise self._in_one_line(error, place, what) from None

    def _in_one_line(self, error: Exception, place: str, what: str) -> TlcaptureError:
        kinds = [type(each).__name__ for each in (error, error.__cause__, error.__context__) if each is not None]
        said = first_line(error)
        if any("Credential" in kind or "ProfileNotFound" in kind for kind in kinds):
            hint = ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" if self.is_s3 else ""
            return InputError(f"{place}: no credentials ({said}){hint}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(
                f"{place}: cannot be {what}: no space is left for what is kept of it on this machine: set "
                "TLCAPTURE_CACHE to a folder on another disk"
            )
        if isinstance(error, PermissionError):
            return StorageError(f"{place}: may not be {what} with these credentials ({said})")
        if isinstance(error, FileNotFoundError):
            bucket = "/".join(self.url.split("/")[:3])
            return InputError(f"{place}: not found ({said}): does the bucket {bucket} exist?")
        if any(_UNREACHED.search(kind) for kind in kinds):
            return StorageError(
                f"{place}: the store cannot be reached ({said}): check the network and AWS_ENDPOINT_URL"
            )
        return StorageError(f"{place}: cannot be {what} ({said})")


def _is_refused(error: BaseException) -> bool:
    """Whether a store refused a write because another one came first."""
    code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
    return code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


def _version(found: dict[str, Any]) -> Version:
    time = next((found[name] for name in _TIMES if found.get(name) is not None), 0)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    seconds = time.timestamp() if isinstance(time, datetime) else float(time)
    tag = next((str(found[name]) for name in _TAGS if found.get(name) is not None), "")
    return Version(int(found.get("size") or 0), int(seconds), tag)


def _is_safe(name: str) -> bool:
    """Whether an object's name is a path that stays below the folder that it is relative to."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
