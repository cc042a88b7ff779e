"""A worker of a Ray cluster: it holds one model and does one piece of work after another, with the code of a local run.

A worker that sees the experiment writes to it. One that does not see it writes to a temporary folder and sends the
files back. Ray starts a worker that died and calls it again; the board remembers what it was doing.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tlcapture.cluster.board import State
from tlcapture.errors import ClusterError, InputError, NoSpaceError, TlcaptureError
from tlcapture.models.checkpoints.transfer import ModelFiles
from tlcapture.runs.display import Display, Progress
from tlcapture.runs.executors import Make, Work, Worker
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.received_files import experiment_inputs
from tlcapture.runs.report import CollectingReport, Done
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import check_changes, read_bytes, write_bytes
from tlcapture.storage.locks import is_held
from tlcapture.storage.temporary_files import writer
from tlcapture.text import first_line

_REPORT_EVERY = 0.5  # seconds


class StopRequested(BaseException):
    """The worker was asked to stop, and has reached a point where it can."""


@dataclass(frozen=True)
class Shared:
    """Everything that all workers of a run need; it is sent to a node once.

    Attributes:
        layout: the experiment in the driver's root.
        make: makes the worker that does the tasks.
        unit: the unit of the work, whose progress is counted.
        load: the loader of the model; `None` where the tasks need no model.
        files: the model's files, where they may have to be sent to a worker.
        threads: the number of threads that torch uses.
        inputs: the files of the experiment that a worker reads whose files are sent back; `None` where the workers
            have to see the root.
        presence: the file in the root whose lock the driver holds.
    """

    layout: Layout
    make: Make
    unit: str
    load: ModelLoader | None
    files: ModelFiles | None
    threads: int
    inputs: Mapping[str, bytes] | None
    presence: Path

    @classmethod
    def of(cls, work: Work, layout: Layout, presence: Path, threads: int, *, collect: bool) -> Shared:
        """Everything that the workers of a run need; with `collect` they send their files back."""
        absolute = Layout(layout.root.resolve(), layout.experiment)
        load, files = (None, None) if work.model is None else (work.model.silent(), work.model.files())
        inputs = experiment_inputs([layout, *work.reads]) if collect else None
        return cls(absolute, work.make, work.unit, load, files, max(1, threads), inputs, presence)

    @property
    def sends_back(self) -> bool:
        """Whether workers send their files back, and are sent those that they read."""
        return self.inputs is not None


@dataclass(frozen=True)
class Result:
    """A worker's answer to a call: what was done, an error that ends the run, and the files that are sent back.

    Attributes:
        worker: its name with its node.
        process: the number of its process.
        rate: the new tokens per second, as text with a comma; empty if there are none.
        lacks_model: nothing was done, since the model's files have to be sent first.
        files: content by path relative to the root; `None` where the worker writes to the experiment itself.
    """

    worker: str
    process: int
    done: Done = Done()
    rate: str = ""
    error: TlcaptureError | None = None
    lacks_model: bool = False
    files: Mapping[str, bytes] | None = None


class _WorkerDisplay(Display, Progress):
    """Counts units of work, and stops the work at a point where that is safe once `stop_requested` is set."""

    def __init__(self) -> None:
        self.unit = ""
        self.units = 0
        self.facts: dict[str, Any] = {}
        self.stop_requested = threading.Event()

    def uses(self, **facts: Any) -> None:
        self.facts.update(facts)

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        yield self if unit == self.unit else _Uncounted(self)

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        self.units += units
        if self.stop_requested.is_set():
            raise StopRequested


class _Uncounted(Progress):
    """Progress in a unit that the work is not counted in; the work can be stopped here too."""

    def __init__(self, display: _WorkerDisplay):
        self._display = display

    def advance(self, units: int = 0, *, done: str | None = None, share: float | None = None) -> None:
        self._display.advance()


class WorkerActor:
    """The class of the Ray actors; they report to the actor named `board`, if any."""

    def __init__(self, number: int = 0, board: str | None = None):
        self._number = number
        self._board: Any = None if board is None else _actor(board)
        self._node = socket.gethostname()
        self._name = f"worker {number} on {self._node}"
        self._process, self._on = _process()
        self._folder: Path | None = None
        self._inputs: set[str] = set()
        self._worker: Worker | None = None
        self._doing = "starting"
        self._display = _WorkerDisplay()
        self._report = CollectingReport(Path())  # replaced once the experiment is known
        if board is not None:
            threading.Thread(target=self._report_to_the_board, daemon=True).start()

    def prepare(self, shared: Sequence[Any], model: Mapping[str, Any]) -> Result:
        """Load what every task needs, once; an error is one that every worker would have.

        Args:
            shared: the reference of what all workers need, in a list, so that Ray fetches it only where it is read.
            model: references of the model's files in the object store, where they are there already.
        """
        try:
            if self._worker is None:
                self._use(_fetched(*shared))
                self._check_root()
                if self._lacks_model(model):
                    return Result(self._name, os.getpid(), lacks_model=True)
                self._doing = "loading"
                worker = self._made_worker()
                worker.prepare()
                self._worker, self._doing = worker, "ready"
        except TlcaptureError as error:
            return self._result(error)
        return self._result()

    def do(
        self,
        piece: int,
        label: str,
        task: Any,
        inputs: Mapping[str, bytes],
        shared: Sequence[Any],
        model: Mapping[str, Any],
    ) -> Result:
        """Do a piece; `inputs` are the files that it reads, where this worker does not see the root."""
        prepared = self.prepare(shared, model)
        if prepared.error is not None or prepared.lacks_model:
            return prepared
        assert self._worker is not None
        self._mark(piece, label)
        error, began = None, time.monotonic()
        try:
            self._doing = label
            self._write_inputs(inputs)
            self._worker.do(task)
        except TlcaptureError as found:
            error = found
        except StopRequested:
            pass
        self._doing = "ready"
        return self._result(error, time.monotonic() - began)

    def _result(self, error: TlcaptureError | None = None, seconds: float = 0.0) -> Result:
        done = self._report.drain()
        rate = f"{done.n_tokens / seconds:.0f} tokens/s, " if done.n_tokens and seconds else ""
        return Result(self._name, os.getpid(), done, rate, error, files=self._take_outputs())

    def _use(self, shared: Shared) -> None:
        self._shared = shared
        self._display.unit = shared.unit
        if shared.inputs is not None and self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="tlcapture-"))
        self._layout = shared.layout if self._folder is None else Layout(self._folder, shared.layout.experiment)
        self._report = CollectingReport(self._layout.folder)
        self._write_inputs(shared.inputs or {})

    def _mark(self, piece: int, label: str) -> None:
        """Tell the driver of the piece before doing anything that may end this process."""
        if self._board is not None:
            import ray

            ray.get(self._board.begin.remote(piece, label, self._name, self._process, writer()))

    def _report_to_the_board(self) -> None:
        import ray

        while True:
            with suppress(ray.exceptions.RayError):  # the driver may have ended
                state = State(self._process, self._on, self._doing, self._display.units, dict(self._display.facts))
                if ray.get(self._board.report.remote(self._number, state)):
                    self._display.stop_requested.set()
            time.sleep(_REPORT_EVERY)

    def _check_root(self) -> None:
        """Raise `InputError` unless this worker can read the driver's file in the root and write beside it.

        From then on it changes files only while the driver holds the lock of that file: another run may follow.
        """
        if self._folder is not None:
            return
        presence = self._shared.presence
        try:
            seen = presence.read_text() == presence.name
            answer = presence.with_name(f"{presence.name}.{os.getpid()}")
            answer.touch()
            answer.unlink()
        except OSError:
            seen = False
        if not seen:
            raise InputError(
                f"a worker on {self._node} does not see {presence.parent}: give a --root that all nodes of "
                "the cluster share, or pass --collect to have files sent back"
            )
        check_changes(partial(_check_driver, presence))

    def _lacks_model(self, contents: Mapping[str, Any]) -> bool:
        """Whether the model's files still have to be sent to this machine; files in the object store are copied."""
        files = self._shared.files
        if files is None or files.found() is not None:
            return False
        if contents:
            import ray

            files.receive(lambda name: ray.get(contents[name]))
        return not contents

    def _made_worker(self) -> Worker:
        shared = self._shared
        if (torch := sys.modules.get("torch")) is not None:  # what `make` needs has been imported with it
            torch.set_num_threads(shared.threads)
        # The other processors of the machine are for other workers.
        os.environ["TLCAPTURE_PROCESSES"] = "0"
        os.environ.setdefault("TLCAPTURE_WRITERS", str(max(1, shared.threads // 2)))
        source = None if shared.files is None else shared.files.found()
        load = None if shared.load is None else replace(shared.load, display=self._display, source=source)
        return shared.make(Run(self._layout, self._report, self._display), load)

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


def _fetched(shared: Any) -> Shared:
    """The object behind a Ray reference; without Ray, the argument itself."""
    if isinstance(shared, Shared):
        return shared
    import ray

    try:
        found: Shared = ray.get(shared)
    except ray.exceptions.RaySystemError as error:  # what it names is not there
        raise ClusterError(
            f"{socket.gethostname()}: {first_line(error)}: every node needs the same version of tlcapture and of Python"
        ) from None
    return found


def _actor(name: str) -> Any:
    import ray

    return ray.get_actor(name)


def _process() -> tuple[str, str]:
    """Ray's names of this process and of its node."""
    import ray

    if not ray.is_initialized():
        return "", ""
    here = ray.get_runtime_context()
    return str(here.get_worker_id()), str(here.get_node_id())


def _check_driver(presence: Path, path: Path) -> None:
    """Raise `NoSpaceError`, which ends all work, if the driver has ended; the first file is the driver's."""
    if not is_held(presence):
        raise NoSpaceError(f"{path}: not changed: the run that this worker belongs to has ended")
