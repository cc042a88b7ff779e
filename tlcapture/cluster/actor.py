"""A worker of a Ray cluster: one model, one task after the other, with the code of a local run.

What it writes goes to the experiment itself, which it must see; or into a folder of its own, whose
files it sends back.
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
from pathlib import Path
from typing import Any

from tlcapture.errors import TlcaptureError
from tlcapture.models.transfer import ModelFiles
from tlcapture.runs.display import Display, Progress
from tlcapture.runs.executors import Make, Worker
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.report import Done, RunReport
from tlcapture.runs.run import Run
from tlcapture.storage.files import Written, read_bytes, write_bytes
from tlcapture.storage.layout import Layout


class Told(BaseException):
    """The worker was told to stop, and is at a point where it can."""


@dataclass(frozen=True)
class Result:
    """What came of a task: what was done, an error that ends the run, and files where they are sent back."""

    done: Done
    error: TlcaptureError | None = None
    stopped: bool = False
    files: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class Place:
    """Where a worker runs, and whether it sees the driver's root there."""

    node: str
    process: int
    sees_root: bool


@dataclass(frozen=True)
class State:
    """How far a worker is: units counted since it began, and what it uses."""

    units: int
    facts: Mapping[str, Any]


class _WorkerReport(RunReport):
    """A report that remembers everything since it was last handed over."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._written: list[Written] = []

    def wrote(self, written: Written) -> None:
        super().wrote(written)
        self._written.append(written)

    def hand_over(self) -> Done:
        done = Done(
            self._written,
            self.failures,
            self.warnings,
            self.n_prompts,
            self.n_skipped,
            self.n_tokens,
            self.n_removed,
        )
        self._written, self.failures, self.warnings = [], [], []
        self.n_prompts = self.n_skipped = self.n_tokens = self.n_removed = 0
        return done


class _WorkerDisplay(Display, Progress):
    """Counts, and stops the work where it may be stopped."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self.units = 0
        self.facts: dict[str, Any] = {}
        self.told = threading.Event()

    def uses(self, **facts: Any) -> None:
        self.facts.update(facts)

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> Iterator[Progress]:
        yield self if unit == self._unit else _Uncounted(self)

    def advance(self, units: int = 0, *, done: str | None = None) -> None:
        self.units += units
        if self.told.is_set():
            raise Told


class _Uncounted(Progress):
    """Progress in another unit than the work's: it only stops the work."""

    def __init__(self, display: _WorkerDisplay):
        self._display = display

    def advance(self, units: int = 0, *, done: str | None = None) -> None:
        self._display.advance()


class WorkerActor:
    """What Ray makes an actor of.

    Args:
        load: loads the model, from `files` where they are named.
        threads: how many torch computes with.
        collected: what a worker without the root gets of it; `None` for one that sees it.
    """

    def __init__(
        self,
        layout: Layout,
        make: Make,
        unit: str,
        load: ModelLoader | None,
        files: ModelFiles | None,
        threads: int,
        collected: Mapping[str, bytes] | None,
    ):
        self._load = load
        self._files = files
        self._threads = threads
        self._own = None if collected is None else Path(tempfile.mkdtemp(prefix="tlcapture-"))
        self._layout = layout if self._own is None else Layout(self._own, layout.experiment)
        self._given: set[str] = set()
        self._give(collected or {})
        self._make = make
        self._worker: Worker | None = None
        self._report = _WorkerReport(self._layout.folder)
        self._display = _WorkerDisplay(unit)

    def place(self, probe: Path, content: bytes) -> Place:
        """Where this is. It sees the root if it reads in a file there what the driver wrote, and can write there."""
        try:
            seen = probe.read_bytes() == content
            answer = probe.with_name(f"{probe.name}.{os.getpid()}")
            answer.touch()
            answer.unlink()
        except OSError:
            seen = False
        return Place(socket.gethostname(), os.getpid(), seen)

    def lacks_model(self) -> bool:
        """Whether the model's files have to be sent here."""
        return self._files is not None and self._files.found() is None

    def take_model(self, contents: Mapping[str, Any]) -> None:
        """Take the model's files out of the object store, where no other worker of this machine has."""
        import ray

        assert self._files is not None
        self._files.receive(lambda name: ray.get(contents[name]))

    def prepare(self) -> TlcaptureError | None:
        """Load what every task needs; returns what goes wrong for every worker alike."""
        try:
            self._work().prepare()
        except TlcaptureError as error:
            return error
        return None

    def do(self, task: Any, inputs: Mapping[str, bytes]) -> Result:
        """Do a task; `inputs` are the files that it reads, where this worker has no root."""
        error, stopped = None, False
        try:
            self._give(inputs)
            self._work().do(task)
        except TlcaptureError as found:
            error = found
        except Told:
            stopped = True
        return Result(self._report.hand_over(), error, stopped, self._made())

    def state(self) -> State:
        return State(self._display.units, dict(self._display.facts))

    def stop(self) -> None:
        """Have the task in hand end at the next point where it can."""
        self._display.told.set()

    def _work(self) -> Worker:
        if self._worker is None:
            import torch

            torch.set_num_threads(self._threads)
            self._worker = self._make(Run(self._layout, self._report, self._display), self._loader())
        return self._worker

    def _loader(self) -> ModelLoader | None:
        if self._load is None:
            return None
        source = None if self._files is None else self._files.found()
        return replace(self._load, display=self._display, source=source)

    def _give(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            write_bytes(self._layout.root / name, content)
            self._given.add(name)

    def _made(self) -> dict[str, bytes] | None:
        """The files of a folder of one's own, which are then removed."""
        if self._own is None:
            return None
        found = {}
        for path in sorted(self._own.rglob("*")):
            name = path.relative_to(self._own).as_posix()
            if path.is_file() and name not in self._given and "/.locks/" not in name:
                found[name] = read_bytes(path)
                path.unlink()
        return found

    def __del__(self) -> None:
        if getattr(self, "_own", None) is not None:
            shutil.rmtree(str(self._own), ignore_errors=True)
