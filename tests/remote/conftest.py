"""An S3 server on the loopback, with an empty bucket for each test."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The application of S3 alone, since that of all services compares each request with the patterns of hundreds.
_SERVER = (
    "import logging, sys, threading\n"
    "from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app\n"
    "from werkzeug.serving import make_server\n"
    "logging.getLogger('werkzeug').setLevel(logging.ERROR)\n"
    "MotoRequestHandler.protocol_version = 'HTTP/1.1'\n"  # keeps connections
    "server = make_server('127.0.0.1', 0, create_backend_app('s3'), True, request_handler=MotoRequestHandler)\n"
    "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
    "print(*server.server_address[:2], flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server, which ends with the tests."""
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdin is not None and server.stdout is not None
    host, port = server.stdout.readline().decode().split()
    yield f"http://{host}:{port}"
    server.stdin.close()
    server.wait(10)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is kept of remote roots."""
    from tlcapture.storage.remote import roots as remote_roots

    folder = tmp_path / "cache"
    monkeypatch.setattr(remote_roots, "cache_folder", lambda: folder)
    monkeypatch.setattr(remote_roots, "_mounts", {})
    return folder


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """fsspec's file system of the server, which commands use too."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return s3fs.S3FileSystem(use_listings_cache=False)


@pytest.fixture
def bucket(s3: Any, cache: Path) -> str:
    """The URL of a root in a new bucket."""
    name = f"bucket-{secrets.token_hex(4)}"
    s3.mkdir(name)
    return f"s3://{name}/some/root"
