"""Compare the tests of this checkout with those of another one: CPU time, and the lines of the package that they run.

    pip install --target DIR coverage
    PYTHONPATH=DIR python benchmarks/tests_cost.py --baseline DIR2 [PYTEST ARGUMENTS]

DIR2 is a checkout of the revision to compare with (`git worktree add DIR2 REVISION`). Both run with one process, side
by side, so that what else the machine does disturbs both alike, and under the same tracer. CPU time is that of pytest
and of the processes that it waited for; coverage is that of its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

_HERE = Path(__file__).resolve().parents[1]


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.argument("words", nargs=-1)
def main(baseline: Path, words: tuple[str, ...]) -> None:
    """Run the tests of two checkouts and print what they cost and cover."""
    with ThreadPoolExecutor() as pool:
        works = {name: pool.submit(_measure, tree, words) for name, tree in (("baseline", baseline), ("here", _HERE))}
    costs = {name: work.result() for name, work in works.items()}
    for name, cost in costs.items():
        click.echo(f"{name:8}  {cost.cpu:7.0f} CPU-seconds  {cost.wall:7.0f} seconds  {cost.covered} % of lines")
    here, before = costs["here"], costs["baseline"]
    click.echo(f"ratio     {here.cpu / before.cpu:7.2f}              {here.wall / before.wall:7.2f}")


@dataclass(frozen=True)
class _Cost:
    cpu: float
    wall: float
    covered: str


def _measure(tree: Path, words: tuple[str, ...]) -> _Cost:
    tree = tree.resolve()
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(tree))))
    coverage = [sys.executable, "-m", "coverage"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": paths, "COVERAGE_FILE": f"{folder}/coverage"}
        command = [*coverage, "run", "--source=tlcapture", "-m", "pytest", "-q", *words]
        start = time.monotonic()
        with open(f"{folder}/output", "w+") as output:
            process = subprocess.Popen(command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.monotonic() - start
            output.seek(0)
            lines = output.read().splitlines()
        click.echo("\n".join(lines[-20 if status else -1 :]))
        if status:
            click.echo(f"the tests of {tree.name} failed, so what they cost may not be all", err=True)
        report = [*coverage, "report", "--format=total", "--precision=1"]
        covered = subprocess.run(report, cwd=tree, env=environment, check=True, capture_output=True, text=True).stdout
    return _Cost(usage.ru_utime + usage.ru_stime, wall, covered.strip())


if __name__ == "__main__":
    main()
