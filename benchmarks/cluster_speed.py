"""Compare the throughput of one and two Ray workers with one thread each, and their files with those of a local run.

    python benchmarks/cluster_speed.py [--prompts 32] [--new-tokens 30] [--rounds 3] [--baseline DIR]

The embedded model captures the same prompts in the same batches. The measured time excludes starting the workers and
loading the model. With `--baseline`, two workers of another checkout do the same in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' comparison of experiments

from tests.faults.commands import contents
from tlcapture.prompts.prompt_sets import read_prompt_set
from tlcapture.storage.experiments.datasets import Datasets

TOP = Path(__file__).parents[1]
BATCH = 4


@click.command()
@click.option("--prompts", default=32, show_default=True, type=click.IntRange(4))
@click.option("--new-tokens", default=30, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--baseline",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another checkout, whose workers to measure as well.",
)
def main(prompts: int, new_tokens: int, rounds: int, baseline: Path | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_prompt_set(root, prompts)
        runs = {"ray1": (1, TOP), "ray2": (2, TOP)} | ({} if baseline is None else {"baseline": (2, baseline)})
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, (workers, tree) in runs.items():
                words = ("--executor", "ray", "--workers", str(workers))
                summary = capture(root, name, new_tokens, *words, tree=tree)
                seconds = summary["cluster"]["seconds"]
                times[name].append(seconds)
                click.echo(
                    f"round {number + 1}, {workers} workers of {tree.name}: {seconds:.1f} s at work, "
                    f"{summary['new_tokens'] / seconds:.0f} tokens/s"
                )
        show("throughput of two one-thread workers / of one", times["ray1"], times["ray2"])
        if baseline is not None:
            show("time of two workers / of two of the baseline", times["ray2"], times["baseline"])
        capture(root, "local", new_tokens)
        compare(root, "ray2", "local")


def show(what: str, ones: list[float], others: list[float]) -> None:
    """Print the ratios of rounds."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    click.echo(f"{what}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def make_prompt_set(root: Path, count: int) -> None:
    """Write a prompt set with the first `count` prompts of the shipped sets."""
    datasets = Datasets(root)
    texts = [prompt.text for name in datasets.prompt_sets() for prompt in read_prompt_set(datasets, name).prompts]
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts[:count], start=1)]
    path = root / "datasets" / "inference" / "many.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"name": "many", "prompts": rows}))


def capture(root: Path, experiment: str, new_tokens: int, *words: str, tree: Path = TOP) -> dict[str, Any]:
    """Capture the set with the code of a checkout and one thread per process; returns the summary."""
    command = [
        sys.executable, "-m", "tlcapture", "capture", "--root", str(root), "--experiment", experiment,
        "--prompt-set", "many", "--max-new-tokens", str(new_tokens), "--temperature", "0",
        "--batch-size", str(BATCH), "--json", *words,
    ]  # fmt: skip
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "check": True, "cwd": root}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, **how)
    return dict(json.loads(done.stdout))


def compare(root: Path, one: str, other: str) -> None:
    """Print how many files of two experiments are equal, except for the experiment's name and dates."""
    found = [contents(root / "experiments" / name) for name in (one, other)]
    for value in (each for content in found for each in content.values()):
        value.get("metadata", {}).pop("inference_experiment", None)
    same = sum(found[0][name] == found[1].get(name) for name in found[0])
    click.echo(f"{same} of {len(found[0])} files of the cluster equal those of a local run bit for bit")
    if same != len(found[0]) or len(found[0]) != len(found[1]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
