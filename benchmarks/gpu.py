"""Measure on a GPU: generation beside Hugging Face, launches, whole captures, memory, and the tests of the model.

    python benchmarks/gpu.py [--baseline DIR] [--out benchmarks] [--seconds 345]

Random weights in the shape of Gemma-2-2B, bfloat16, prompts of 100 tokens, 50 new tokens. Hugging Face, this checkout
and the one in DIR each have a process with the model loaded, and take turns; a figure is the median of its rounds after
one that is not counted. Parts that were never measured come first; --only and --skip choose. What has not begun when
the seconds are over is left out and named. Writes GPU.md and gpu.json.

It needs torch, transformers and a GPU, and no network: `make bench-gpu-wheels` downloads everything else beforehand,
for Python 3.12 on Linux. `--shape tiny --device cpu` tries the script anywhere; with `--shape wide`, whose model takes
little of the time, `--only command` shows what a capture does besides.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from bench import END_OF_TABLE as END_OF_TABLES
from gpu_report import Report
from gpu_stacks import py_spy, recording, seconds_of

HERE = Path(__file__).resolve().parent
THEIRS = ("plain", "hidden states")
RESULT = "result "
_LONG = 4.0  # seconds
_TESTS = (
    "tests/fast",
    "tests/test_recording.py",
    "tests/test_generation.py",
    "tests/test_sampling.py",
    "tests/test_draws.py",
    "tests/views",
    "tests/test_parity.py",
)


class WorkloadError(Exception):
    """A workload that failed, with its reason."""


class Worker:
    """A process with the model loaded that runs workloads by name, for one tree of the project or for Hugging Face."""

    def __init__(self, name: str, tree: Path, work: Path, device: str):
        self.name = name
        self._log = (work / f"{name}.log").open("w")
        command = [sys.executable, str(HERE / "gpu_worker.py"), name, str(work), device]
        self._process = subprocess.Popen(
            command, env=environment(tree), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def run(self, workload: str) -> dict[str, Any]:
        """What a workload measured; raises `WorkloadError` if it failed or the process has ended."""
        self.begin(workload)
        return self.result()

    def begin(self, workload: str) -> None:
        assert self._process.stdin is not None
        self._workload = workload
        try:
            self._process.stdin.write(f"{workload}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkloadError(f"{self.name} has ended: {self._last_words()}") from None

    def result(self) -> dict[str, Any]:
        """What the workload that was begun measured."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(RESULT):
                found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
                if "error" in found:
                    raise WorkloadError(f"{self.name}, {self._workload}: {found['error']}")
                return found
        raise WorkloadError(f"{self.name} has ended: {self._last_words()}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        lines = Path(self._log.name).read_text().strip().splitlines()
        return lines[-1][:300] if lines else "no message"


def environment(tree: Path, **more: str) -> dict[str, str]:
    """The environment of a child process that imports the package from a tree."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path, **more}


@dataclass
class Session:
    """What is measured, on which trees, and until when."""

    trees: dict[str, Path]
    work: Path
    device: str
    rounds: int
    until: float
    report: Report
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def part(self, name: str, needs: float, measure: Callable[[], None]) -> None:
        """Measure a part if there is time for it; a failure is noted, and the other parts go on."""
        if self.seconds_left < needs:
            self.report.notes.append(f"Left out: {name}, with {self.seconds_left:.0f} s left.")
            return
        start = time.monotonic()
        try:
            measure()
        except (WorkloadError, subprocess.SubprocessError, OSError, ValueError) as error:
            self.report.notes.append(f"Failed: {name}: {error}")
        click.echo(f"{name}: {time.monotonic() - start:.1f} s, {self.seconds_left:.0f} s left", err=True)

    def start_workers(self) -> None:
        for name, tree in {"hugging face": self.trees["this"], **self.trees}.items():
            self.workers[name] = Worker(name, tree, self.work, self.device)
        self.report.machine |= self.workers["hugging face"].run("make the model")
        for name in self.trees:
            self.workers[name].begin("load")
        for name in self.trees:
            self.report.loaded[name] = self.workers[name].result()

    def in_turn(self, batch: int, workloads: Sequence[tuple[str, str]]) -> None:
        """Run workloads `(worker, name)` in turn, one round more than counted; one round of those that take long."""
        figures: dict[tuple[str, str], list[dict[str, Any]]] = {each: [] for each in workloads}
        for number in range(self.rounds + 1):
            for worker, name in list(figures):
                done = figures[worker, name]
                if number and (self.seconds_left < 15 or (done and done[-1]["seconds"] > _LONG)):
                    continue
                try:
                    found = self.workers[worker].run(f"{name} {batch}")
                except WorkloadError as error:
                    self.report.notes.append(f"Failed: {error}")
                    del figures[worker, name]
                    continue
                if number:
                    done.append(found)
        for (worker, name), found_each in figures.items():
            if found_each:
                self.report.add_speed(
                    worker,
                    name,
                    batch,
                    [each["tokens"] / each["seconds"] for each in found_each],
                    statistics.median(each.get("peak_GB", 0) for each in found_each),
                )

    def speeds(self, batch: int, theirs: Sequence[str], ours: Sequence[str]) -> None:
        of_trees = [(tree, name) for name in ours for tree in self.trees]
        self.in_turn(batch, [*(("hugging face", name) for name in theirs), *of_trees])

    def sampled_speeds(self) -> None:
        workers = ["hugging face", *self.trees]
        self.in_turn(64, [(worker, "temperature 0.7") for worker in workers])

    def once(self, workload: str, into: dict[str, Any], workers: Sequence[str]) -> None:
        for worker in workers:
            into[worker] = self.workers[worker].run(workload)

    def command(
        self,
        what: str,
        n_prompts: int,
        *options: str,
        place: str = "memory",
        trees: Sequence[str] = ("this",),
        watched: bool = False,
    ) -> None:
        """Run `tlcapture capture` of some prompts, in batches of 64, with the files in memory or on the disk.

        Where `watched`, it is said where its threads were.
        """
        folder = self.work if place == "memory" else Path(tempfile.mkdtemp(dir=self.report.disk_folder))
        try:
            for name in filter(self.trees.__contains__, trees):
                if self.seconds_left < 30:
                    self.report.notes.append(f"Left out: files to {place}, {what}, {name}.")
                    continue
                stacks = self.work / f"{name}-{n_prompts}.stacks" if watched and py_spy() else None
                found = self._command(name, self.trees[name], folder, n_prompts, options, stacks)
                self.report.captures.append({"tree": name, "place": place, "what": what, "prompts": n_prompts, **found})
                if stacks is not None:
                    self.report.threads[f"{what}, {n_prompts} prompts, {name}"] = seconds_of(stacks)
        finally:
            if place != "memory":
                shutil.rmtree(folder, ignore_errors=True)

    def _command(
        self, name: str, tree: Path, folder: Path, n_prompts: int, options: Sequence[str], stacks: Path | None
    ) -> dict[str, Any]:
        root = folder / f"root-{name}"
        prepare = [sys.executable, str(HERE / "gpu_worker.py"), "prepare", str(self.work), str(root), str(n_prompts)]
        subprocess.run(prepare, env=environment(tree), check=True, capture_output=True)
        temperature = () if "--temperature" in options else ("--temperature", "0")
        command = [] if stacks is None else recording(str(py_spy()), stacks)
        command += [sys.executable, "-m", "tlcapture", "capture", "--root", str(root), "--experiment", "bench"]
        command += ["--model", str(self.work / "model"), "--prompt-set", "bench", "--max-new-tokens", "50"]
        command += ["--batch-size", "64", "--device", self.device, "--dtype", "bfloat16", "--json"]
        command += [*temperature, *options]
        limit = min(90.0, max(30.0, self.seconds_left))
        # With -m, Python imports from the current folder first.
        done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=limit)
        if done.returncode:
            raise WorkloadError(f"{name}, {' '.join(options)}: exit {done.returncode}: {done.stderr.strip()[-300:]}")
        said = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
        files = [path.stat().st_size for path in (root / "experiments/bench/inference").rglob("*") if path.is_file()]
        shutil.rmtree(root)
        return {
            "seconds": said["seconds"],
            "tokens_per_s": said["new_tokens"] / said["seconds"],
            "files": len(files),
            "GB": sum(files) / 1e9,
        }

    def tests(self) -> None:
        for worker in self.workers.values():
            worker.end()
        # After an interrupt pytest still says what has failed.
        limit = ["timeout", "--signal=INT", str(max(30, int(self.seconds_left)))]
        command = [*limit, sys.executable, "-m", "pytest", "-q", "-n", "12", "-p", "no:cacheprovider", *_TESTS]
        tree = self.trees["this"]
        where = environment(tree, TLCAPTURE_TEST_DEVICE=self.device)
        done = subprocess.run(command, env=where, cwd=tree, capture_output=True, text=True)
        self.report.tests = done.stdout.strip().splitlines()[-1].strip("= ")
        self.report.failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        self.report.test_output = done.stdout[-60_000:]


@click.command()
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An earlier checkout.")
@click.option("--out", default=HERE, type=click.Path(file_okay=False, path_type=Path), help="Where GPU.md is written.")
@click.option("--seconds", default=345.0, show_default=True, help="Begin nothing after that many seconds.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Rounds to measure.")
@click.option("--shape", default="gemma-2-2b", type=click.Choice(["gemma-2-2b", "wide", "tiny"]), show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--disk", default=None, help="A folder on a disk, for files; the current folder by default.")
@click.option("--skip", default="", help="Parts to leave out, comma-separated, by the names that are printed.")
@click.option("--only", default="", help="Parts to measure, comma-separated; all by default.")
def main(
    baseline: Path | None,
    out: Path,
    seconds: float,
    rounds: int,
    shape: str,
    device: str,
    disk: str | None,
    skip: str,
    only: str,
) -> None:
    """Measure on a GPU and write GPU.md."""
    until = time.monotonic() + seconds
    trees = {"this": HERE.parent} | ({"before": baseline.resolve()} if baseline is not None else {})
    report = Report(list(trees), rounds, shape, disk or str(Path.cwd()))
    out.mkdir(parents=True, exist_ok=True)
    before = (out / "GPU.md").read_text() if (out / "GPU.md").exists() else ""
    remarks = before.partition(END_OF_TABLES)[2] or "\n"
    skipped, asked = ({name.strip() for name in names.split(",") if name.strip()} for names in (skip, only))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        work = Path(folder)
        (work / "shape").write_text(shape)
        session = Session(trees, work, device, rounds, until, report)
        everyone = ["hugging face", *trees]
        both, few = ("nothing", "residual"), THEIRS[:1]
        parts: list[tuple[str, float, Callable[[], None]]] = [
            ("start", 30, session.start_workers),
            ("profile of the lens", 10, lambda: session.once("profile of the lens", report.lens, list(trees))),
            ("lens", 15, lambda: session.speeds(64, (), ("nothing", "residual and lens"))),
            ("batch 10", 10, lambda: session.speeds(10, few, both)),
            ("batch 1", 10, lambda: session.speeds(1, few, both)),
            ("memory", 15, lambda: session.once("long 1", report.memory, everyone)),
            ("command", 40, lambda: session.command("ten traits", 64, trees=list(trees))),
            ("several batches", 45, lambda: session.command("ten traits", 192, trees=list(trees), watched=True)),
            ("many batches", 50, lambda: session.command("ten traits", 640)),
            ("bridge", 30, lambda: session.speeds(64, few, ("bridge: nothing", "bridge: residual"))),
            ("command with the lens", 40, lambda: session.command("lens alone", 64, "--no-project", "--logit-lens")),
            ("disk", 40, lambda: session.command("ten traits", 64, place="disk")),
            ("compiled", 90, lambda: session.once("compiled 64", report.compiled, ["hugging face"])),
            ("batch 64", 20, lambda: session.speeds(64, THEIRS, ("residual", "residual and attention"))),
            ("temperature 0.7", 15, session.sampled_speeds),
            ("profile", 15, lambda: session.once("profile", report.profiles, list(trees))),
            ("command without traits", 40, lambda: session.command("no traits", 64, "--no-project", trees=list(trees))),
            ("tests", 40, session.tests),
        ]
        if unknown := (skipped | asked) - {name for name, _, _ in parts}:
            raise click.UsageError(f"no part {', '.join(sorted(unknown))}: {', '.join(name for name, _, _ in parts)}")
        try:
            for name, needs, measure in parts:
                if name not in skipped and (not asked or name in (*asked, "start")):
                    session.part(name, needs, measure)
                    (out / "gpu.json").write_text(report.json())
                    for stacks in work.glob("*.stacks"):
                        shutil.copy(stacks, out)
                    (out / "GPU.md").write_text(f"{report.markdown()}\n{END_OF_TABLES}{remarks}")
        finally:
            for worker in session.workers.values():
                worker.end()
            for log in work.glob("*.log"):
                text = log.read_text()
                if "Traceback" in text:
                    (out / log.name.replace(" ", "-")).write_text(text[-200_000:])
    click.echo(report.markdown())


if __name__ == "__main__":
    main()
