"""Measure implementations in alternation, and format the results as rows of a table."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One result of a workload; a smaller figure is better unless `at_least`."""

    workload: str
    what: str
    figures: Sequence[float]
    must: float | None = None
    aim: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    def verdict(self) -> str:
        if self.must is None or self.aim is None:
            return "for comparison"
        sign = -1 if self.at_least else 1
        if sign * self.median <= sign * self.aim:
            return "aim reached"
        return "must reached" if sign * self.median <= sign * self.must else "**falls short**"

    def markdown(self) -> str:
        bound = ">=" if self.at_least else "<="
        must, aim = ("" if each is None else f"{bound} {each:g}" for each in (self.must, self.aim))
        spread = f"{min(self.figures):.2f} to {max(self.figures):.2f}"
        cells = (self.workload, self.what, f"{self.median:.2f}", spread, must, aim, self.verdict(), self.note)
        return "| " + " | ".join(cells) + " |"


HEAD = (
    "| workload | ratio | median | spread | must | aim | verdict | medians behind it |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def in_turn(works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each implementation by round, in alternation (A B A B ...), after one unmeasured round."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


@dataclass(frozen=True)
class Clocked:
    """Seconds of several implementations by round: on the clock, and of processor time, which others disturb less."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]

    def line(self, ours: str, theirs: str) -> str:
        """The median of the rounds' ratios by both clocks, with their range, and the median times."""
        parts = []
        for clock, times in (("processor time", self.processor), ("wall time", self.wall)):
            found = ratios(times, ours, theirs)
            spread = f"{min(found):.3f} to {max(found):.3f}"
            parts.append(f"{clock} {statistics.median(found):.3f} ({spread}; {statistics.median(times[ours]):.3f} s)")
        return f"{ours} / {theirs}, {len(found)} rounds: {', '.join(parts)}"


def clocked(works: Mapping[str, Work], rounds: int) -> Clocked:
    """Times by round, after one unmeasured round; each round runs them in the opposite order of the one before."""
    for work in works.values():
        work()
    found = Clocked({name: [] for name in works}, {name: [] for name in works})
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else reversed(list(works)):
            wall, processor = time.perf_counter(), time.process_time()
            works[name]()
            found.processor[name].append(time.process_time() - processor)
            found.wall[name].append(time.perf_counter() - wall)
    return found


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(times: dict[str, list[float]], ours: str, theirs: str) -> list[float]:
    """Our time divided by theirs in each round."""
    return [a / b for a, b in zip(times[ours], times[theirs], strict=True)]


def medians(times: dict[str, list[float]], *, milli: bool = False) -> str:
    unit, factor = ("ms", 1000) if milli else ("s", 1)
    return ", ".join(f"{name} {statistics.median(each) * factor:.3g} {unit}" for name, each in times.items())


def command(*arguments: str, root: Path | None = None) -> Work:
    """A function that runs `python ARGUMENTS` to completion and discards its output."""

    def run() -> None:
        run_child(arguments, root)

    return run


def run_child(arguments: Sequence[str], root: Path | None = None, python: Path = Path(sys.executable)) -> str:
    """Run `PYTHON ARGUMENTS`; returns its standard output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if root is not None:
        environment["TLCAPTURE_ROOT"] = str(root)
    done = subprocess.run([str(python), *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


# The peak of a new process includes that of its parent, which here would include the models loaded by the benchmarks.
_SMALL_PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(usage.ru_maxrss * 1024)
sys.exit(child.returncode)
"""


def peak_memory(arguments: Sequence[str], root: Path | None = None) -> int:
    """The peak resident memory of `python ARGUMENTS` in bytes (Linux only)."""
    return int(run_child(("-c", _SMALL_PARENT, *arguments), root))


def machine() -> str:
    """A line that describes the machine and the package versions."""
    import torch

    names = ("torch", "transformer_lens", "transformers", "nnsight", "orjson", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names if find_spec(name))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB, {accelerator}; "
        f"Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
