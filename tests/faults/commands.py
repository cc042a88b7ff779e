"""The real command in a process that tests can kill, limit and interrupt.

The process is a fork of the test process, which has everything imported, so that hundreds of runs take a minute.
"""

from __future__ import annotations

import gc
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

import tlcapture
from tlcapture.storage.files import read_json

_TIMEOUT = 120  # seconds after which a run counts as hanging
_IMPORTED_WITHIN_FUNCTIONS = (
    "matplotlib.figure", "scipy.special", "scipy.stats", "sklearn.feature_extraction.text", "sklearn.linear_model",
    "sklearn.model_selection",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """The end of a process: its exit status, or minus the signal that killed it, and its output."""

    code: int
    stdout: str
    stderr: str


class Command:
    """`tlcapture WORDS` in a process, which calls `before` first and `after` last."""

    def __init__(
        self,
        folder: Path,
        *words: object,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        for path in self._outputs:
            path.touch()
        import_commands()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                code = _run(self._outputs, [str(word) for word in words], before)
                after()
            finally:
                os._exit(code)

    def end(self) -> Ended:
        """Wait until the process ends."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < _TIMEOUT:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return Ended(os.waitstatus_to_exitcode(status), *(path.read_text() for path in self._outputs))
            time.sleep(min(max(waited / 20, 0.002), 0.05))
        self._fail("the process hangs")

    def _fail(self, what: str) -> NoReturn:
        """Kill the process, which would otherwise hold pipes of this one open."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"{what}; its output is {[self.stdout, self.stderr]}")

    @property
    def stdout(self) -> str:
        """Its standard output so far."""
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        """Its standard error so far."""
        return self._outputs[1].read_text()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def send_when_paused(self, number: signal.Signals) -> None:
        """Wait until the process is where `pause_at` stops it, send it a signal, and let it go on."""
        deadline = time.monotonic() + _TIMEOUT
        while not (found := os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            if time.monotonic() > deadline:
                self._fail("the process never paused")
            time.sleep(0.001)
        if found.si_code != os.CLD_STOPPED:
            self._fail("the process ended")
        self.send(number)
        self.send(signal.SIGCONT)

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds, while the process runs."""
        deadline = time.monotonic() + _TIMEOUT
        while not condition():
            has_ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if has_ended and not condition():
                self._fail("the process ended")
            if time.monotonic() > deadline:
                self._fail("the condition never held")
            time.sleep(0.001)


def pause_at(folder: Path) -> None:
    """Stop this process when it is about to give the first file its name in a folder, however deep."""
    paused = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal paused
        if event == "os.rename" and not paused and str(arguments[1]).startswith(f"{folder}{os.sep}"):
            paused = True
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)


@cache
def import_commands() -> None:
    """Import what commands import when they run, so that no fork has to: it takes longer than most commands.

    What exists then is left out of the garbage collections of forks, which would copy the memory that they go through.
    """
    for module in pkgutil.walk_packages(tlcapture.__path__, "tlcapture."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # of an optional package
                import_module(module.name)
    for name in _IMPORTED_WITHIN_FUNCTIONS:
        import_module(name)
    gc.collect()
    gc.freeze()


def _run(outputs: list[Path], words: list[str], before: Callable[[], object]) -> int:
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["tlcapture", *words]
    torch.set_num_threads(1)  # OpenMP threads do not survive a fork
    try:
        from tlcapture.cli.main import main

        before()
        main(words, prog_name="tlcapture")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 97


DATES = ("projection_date", "capture_date", "timestamp")


def contents(experiment: Path) -> dict[str, Any]:
    """The content of an experiment's files, without dates; fails if a file is incomplete or temporary."""
    found: dict[str, Any] = {}
    for path in sorted(experiment.rglob("*")):
        relative = path.relative_to(experiment).as_posix()
        if path.is_dir() or relative.startswith((".locks/", "runs/")):
            continue
        assert path.suffix in (".pt", ".json"), f"{relative} was left behind"
        value = read_json(path) if path.suffix == ".json" else _tensors(path)
        found[relative] = value
        if isinstance(value, dict) and "metadata" in value:
            value["metadata"] = {k: v for k, v in value["metadata"].items() if k not in DATES}
    return found


def _tensors(path: Path) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (tuple(value.shape), str(value.dtype), value.clone().view(torch.uint8).numpy().tobytes())
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return value

    return plain(torch.load(path, weights_only=True))
