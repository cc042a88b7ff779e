"""A worker of a Ray cluster: it holds one model and does one task after another, with the code of a local run.

A worker that sees the experiment writes to it. One that does not see it writes to a temporary folder and sends the
files back.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tlcapture.errors import NoSpaceError, TlcaptureError
from tlcapture.models.transfer import ModelFiles
from tlcapture.runs.display import Display, Progress
from tlcapture.runs.executors import Make, Worker
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.report import CollectingReport, Done
from tlcapture.runs.run import Run
from tlcapture.storage.files import check_changes, read_bytes, write_bytes
from tlcapture.storage.layout import Layout
from tlcapture.storage.locks import is_held


class StopRequested(BaseException):
    """The worker was asked to stop, and has reached a point where it can."""


@dataclass(frozen=True)
class Result:
    """The result of a task: what was done, an error that ends the run, and the files that are sent back.

    `files` maps paths relative to the root to their content; `None` where the worker writes to the experiment itself.
    """

    done: Done
    error: TlcaptureError | None = None
    stopped: bool = False
    files: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class WorkerLocation:
    """The node and process of a worker, and whether it sees the driver's root there."""

    node: str
    process: int
    sees_root: bool


@dataclass(frozen=True)
class State:
    """The progress of a worker: units counted since it started, and the facts that it recorded for the run."""

    units: int
    facts: Mapping[str, Any]


class _WorkerDisplay(Display, Progress):
    """Counts units of work, and stops the work at a point where that is safe once `stop_requested` is set."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self.units = 0
        self.facts: dict[str, Any] = {}
        self.stop_requested = threading.Event()

    def uses(self, **facts: Any) -> None:
        self.facts.update(facts)

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        yield self if unit == self._unit else _Uncounted(self)

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        self.units += units
        if self.stop_requested.is_set():
            raise StopRequested


class _Uncounted(Progress):
    """Progress in another unit than that of the work: not counted, but the work can be stopped here too."""

    def __init__(self, display: _WorkerDisplay):
        self._display = display

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        self._display.advance()


class WorkerActor:
    """The class of the Ray actors.

    Args:
        layout: the experiment in the driver's root.
        make: makes the worker that does the tasks.
        unit: the unit of the work, whose progress is counted.
        load: the loader of the model; `None` where the tasks need no model.
        files: the model's files, where they may have to be sent to this worker.
        threads: the number of threads that torch uses.
        inputs: the files of the experiment that a worker without access to the root reads; `None` for a worker that
            sees the root.
    """

    def __init__(
        self,
        layout: Layout,
        make: Make,
        unit: str,
        load: ModelLoader | None,
        files: ModelFiles | None,
        threads: int,
        inputs: Mapping[str, bytes] | None,
    ):
        self._load = load
        self._files = files
        self._threads = threads
        self._folder = None if inputs is None else Path(tempfile.mkdtemp(prefix="tlcapture-"))
        self._layout = layout if self._folder is None else Layout(self._folder, layout.experiment)
        self._inputs: set[str] = set()
        self._write_inputs(inputs or {})
        self._make = make
        self._worker: Worker | None = None
        self._report = CollectingReport(self._layout.folder)
        self._display = _WorkerDisplay(unit)

    def locate(self, probe: Path, content: bytes) -> WorkerLocation:
        """The location of this worker. It sees the root if it can read the driver's probe file there and can write.

        From then on it changes files only while the driver holds the lock of the probe file: another run may follow.
        """
        try:
            seen = probe.read_bytes() == content
            answer = probe.with_name(f"{probe.name}.{os.getpid()}")
            answer.touch()
            answer.unlink()
        except OSError:
            seen = False
        if seen and self._folder is None:
            check_changes(partial(_check_driver, probe))
        return WorkerLocation(socket.gethostname(), os.getpid(), seen)

    def needs_model(self) -> bool:
        """Whether the model's files have to be sent to this machine."""
        return self._files is not None and self._files.found() is None

    def receive_model(self, contents: Mapping[str, Any]) -> None:
        """Copy the model's files from the object store, unless another worker of this machine already has."""
        import ray

        assert self._files is not None
        self._files.receive(lambda name: ray.get(contents[name]))

    def prepare(self) -> TlcaptureError | None:
        """Load what every task needs; returns an error that every worker would have."""
        try:
            self._ready_worker().prepare()
        except TlcaptureError as error:
            return error
        return None

    def do(self, task: Any, inputs: Mapping[str, bytes]) -> Result:
        """Do a task; `inputs` are the files that it reads, where this worker does not see the root."""
        error, stopped = None, False
        try:
            self._write_inputs(inputs)
            self._ready_worker().do(task)
        except TlcaptureError as found:
            error = found
        except StopRequested:
            stopped = True
        return Result(self._report.drain(), error, stopped, self._take_outputs())

    def state(self) -> State:
        """The progress so far; can be asked while a task is being done."""
        return State(self._display.units, dict(self._display.facts))

    def stop(self) -> None:
        """Let the current task end at the next point where it can."""
        self._display.stop_requested.set()

    def _ready_worker(self) -> Worker:
        if self._worker is None:
            import torch

            torch.set_num_threads(self._threads)
            # The other processors of the machine are for other workers.
            os.environ["TLCAPTURE_PROCESSES"] = "0"
            os.environ.setdefault("TLCAPTURE_WRITERS", str(max(1, self._threads // 2)))
            self._worker = self._make(Run(self._layout, self._report, self._display), self._loader())
        return self._worker

    def _loader(self) -> ModelLoader | None:
        if self._load is None:
            return None
        source = None if self._files is None else self._files.found()
        return replace(self._load, display=self._display, source=source)

    def _write_inputs(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            write_bytes(self._layout.root / name, content)
            self._inputs.add(name)

    def _take_outputs(self) -> dict[str, bytes] | None:
        """The files that were written to the temporary folder, which are then removed from it."""
        if self._folder is None:
            return None
        found = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and name not in self._inputs and "/.locks/" not in name:
                found[name] = read_bytes(path)
                path.unlink()
        return found

    def __del__(self) -> None:
        if getattr(self, "_folder", None) is not None:
            shutil.rmtree(str(self._folder), ignore_errors=True)


def _check_driver(probe: Path, path: Path) -> None:
    """Raise `NoSpaceError`, which ends all work, if the driver has ended, whose probe file this is."""
    if not is_held(probe):
        raise NoSpaceError(f"{path}: not changed: the run that this worker belongs to has ended")
