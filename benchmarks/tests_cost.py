"""Compare the tests of this checkout with those of another one: CPU time, and the lines of the package that they run.

    pip install --target DIR coverage
    PYTHONPATH=DIR python benchmarks/tests_cost.py --baseline DIR2 [PYTEST ARGUMENTS]

DIR2 is a checkout of the revision to compare with (`git worktree add DIR2 REVISION`). Both run with one process, one
after the other, under the same tracer. CPU time is that of pytest and of the processes that it waited for; coverage is
that of pytest's own process.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import click

_HERE = Path(__file__).resolve().parents[1]


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.argument("words", nargs=-1)
def main(baseline: Path, words: tuple[str, ...]) -> None:
    """Run the tests of two checkouts and print what they cost and cover."""
    seconds = {}
    for name, tree in (("baseline", baseline.resolve()), ("here", _HERE)):
        seconds[name], covered = _measure(tree, words)
        print(f"{name:8}  {seconds[name]:7.0f} CPU-seconds  {covered} % of lines", flush=True)
    print(f"ratio     {seconds['here'] / seconds['baseline']:7.2f}")


def _measure(tree: Path, words: tuple[str, ...]) -> tuple[float, str]:
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(tree))))
    coverage = [sys.executable, "-m", "coverage"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": paths, "COVERAGE_FILE": f"{folder}/coverage"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*coverage, "run", "--source=tlcapture", "-m", "pytest", "-q", *words]
        if subprocess.run(command, cwd=tree, env=environment).returncode:
            raise click.ClickException(f"the tests of {tree} failed")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = [*coverage, "report", "--format=total", "--precision=1"]
        covered = subprocess.run(report, cwd=tree, env=environment, check=True, capture_output=True, text=True).stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, covered.strip()


if __name__ == "__main__":
    main()
