"""Work on a cluster that needs no model: each number is written to a file, and some of them kill their worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tlcapture.cluster import driver
from tlcapture.cluster.executor import RayExecutor
from tlcapture.errors import TlcaptureError
from tlcapture.runs.executors import Work
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import check_changes, write_bytes

DEADLY, SLOW, WRONG = 1000, 2000, 3000  # added to numbers that kill, that take half a second, that are a bug


class Writer:
    """Writes a file for each number, and a line for each number that it begins."""

    def __init__(self, run: Run, load: object):
        self._run = run

    def prepare(self) -> None:
        """Load nothing."""

    def do(self, task: Sequence[int]) -> None:
        """Write the files of some numbers."""
        with self._run.progress(len(task), "numbers", "number") as progress:
            for number in task:
                with (self._run.layout.root / "begun").open("a") as log:
                    log.write(f"{number}\n")
                if DEADLY <= number < SLOW:
                    check_changes(lambda _: os.kill(os.getpid(), signal.SIGKILL))  # in the middle of writing
                if number >= WRONG:
                    raise RuntimeError("a bug")
                time.sleep(0.5 * (number >= SLOW))
                self._run.wrote(write_bytes(self._run.layout.folder / str(number), b""))
                self._run.report.n_prompts += 1
                progress.advance(1)


class NotThere:
    """Cannot be unpickled, as what another version of the package has in other modules."""

    def __reduce__(self) -> Any:
        return import_module, ("tlcapture.not_there",)


def split(task: Sequence[int], most: int) -> list[Sequence[int]]:
    """Parts of at most `most` numbers."""
    return [task[start : start + most] for start in range(0, len(task), most)]


def main(
    address: str,
    root: Path,
    numbers: Sequence[int],
    most: int,
    workers: int,
    cpus: float = 1,
    is_there: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Do the work; what the run reports, or the error that ended it. `settings` are those of the driver."""
    for name, value in settings.items():
        setattr(driver, name, value)
    run = Run.silent(Layout(root, "exp"))
    make: Any = Writer if is_there else NotThere()
    work = Work(make, None, [numbers], size=len, unit="number", split=split)
    error = None
    try:
        RayExecutor(address, workers, cpus, batch_size=most).run(work, run)
    except (TlcaptureError, RuntimeError) as found:
        error = f"{type(found).__name__}: {found}"
    return {**run.report.to_json(), "error": error}
