"""A process that has everything imported, whose forks are a cluster's workers: imports take most of their start."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.faults.commands import import_commands

_IMPORTED_BY_RAY = (
    "attr", "colorama", "google.protobuf.descriptor_pool", "google.protobuf.internal.builder", "jsonschema", "msgpack",
    "peft", "pydantic.v1", "requests", "wcwidth",
)  # fmt: skip


@contextmanager
def warm_workers(path: Path) -> Iterator[None]:
    """Fork a process that starts workers for `start_worker`, as long as the context lasts; it listens at the path."""
    import_commands()
    for name in _IMPORTED_BY_RAY:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()
    assert "ray" not in sys.modules, "it reads its settings from the environment when it is imported"
    tests = os.getpid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        if not (process := os.fork()):
            try:
                _serve(listener, path, tests)
            finally:
                os._exit(1)
    try:
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def raylet_of(path: Path, process: int) -> int:
    """The process of Ray on whose node a worker is."""
    return int(path.with_name(str(process)).read_text())


def _serve(listener: socket.socket, path: Path, tests: int) -> None:
    """Fork this process for each connection, until the process of the tests has ended."""
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener.settimeout(5)
    while os.getppid() == tests:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if not os.fork():
            try:
                _work(connection, path)
            finally:
                os._exit(1)
        connection.close()


def _reap(*_: object) -> None:
    """Leave no zombies of workers."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _work(connection: socket.socket, path: Path) -> None:
    """Become a worker of Ray, in a group of its own, as Ray starts them."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    content, outputs, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    while not content.endswith(b"\n"):
        content += connection.recv(1 << 16)
    asked: dict[str, Any] = json.loads(content)
    path.with_name(str(os.getpid())).write_text(str(asked["raylet"]))
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["variables"])
    torch.set_num_threads(1)  # OpenMP threads do not survive a fork
    from ray._private.workers import setup_worker

    sys.argv = setup_worker.parser.parse_known_args(asked["words"])[1]
    runpy.run_path(sys.argv[0], run_name="__main__")
