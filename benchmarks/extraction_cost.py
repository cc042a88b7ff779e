"""Measure time and peak memory of extracting one trait, with the shared prefix run once or in every example.

    python benchmarks/extraction_cost.py [--trait style/formality] [--rounds 3] [--baseline DIR]

Each measurement runs in a separate process, so that peaks are independent. Times exclude loading the model, whose
memory is reported separately. The last line compares fitting the probes of all layers sequentially with fitting them in
two processes.

With --baseline, a checkout of another revision (`git worktree add DIR REVISION`), it times the commands `extract` and
`evaluate` of both checkouts instead, in turn, on this checkout's examples of the trait. Each is a process of its own,
which loads the embedded model; `evaluate` runs once for each component. `evaluate` of this checkout also runs the
packaged prompt sets in an experiment without a reference, whatever the number of traits: `reference` is that first
run, and the others find the reference there.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

_HERE = Path(__file__).resolve().parent
VARIANTS = ("with the prefix in every example", "with the prefix once")


@click.command()
@click.option("--trait", default="style/formality", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another checkout.")
@click.option("--measure", hidden=True, type=click.Choice(VARIANTS))
def main(trait: str, rounds: int, baseline: Path | None, measure: str | None) -> None:
    """Measure and print a Markdown table and two comparisons."""
    if measure:
        click.echo(json.dumps(_measure(trait, measure)))
        return None
    if baseline is not None:
        return _commands(trait, rounds, {"before": baseline.resolve(), "after": _HERE.parent})
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--trait", trait, "--measure", variant]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    median = {
        variant: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for variant, runs in found.items()
    }
    click.echo(f"{trait}, all layers, three methods, both components; medians of {rounds} alternating processes\n")
    click.echo("| examples run | read-out, s | fits, s | peak memory, MB | of which model and libraries, MB |")
    click.echo("| --- | --- | --- | --- | --- |")
    for variant, values in median.items():
        seconds = f"{values['read_out']:.1f} | {values['fit']:.1f}"
        click.echo(f"| {variant} | {seconds} | {values['peak']:.0f} | {values['model']:.0f} |")
    ratios = [b["read_out"] / a["read_out"] for a, b in zip(*found.values(), strict=True)]
    click.echo(f"\nread-out, once / in every example: {statistics.median(ratios):.2f} (of {len(ratios)} rounds)\n")
    last = median[VARIANTS[1]]
    click.echo(
        f"probe fits of all layers: sequentially {last['in_turn']:.2f} s, in two processes {last['processes']:.2f} s"
    )


def _commands(trait: str, rounds: int, trees: dict[str, Path]) -> None:
    """Time `extract` and `evaluate` of several checkouts, and print a Markdown table."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        roots = {name: Path(folder) / name for name in trees}
        for root in roots.values():
            shutil.copytree(_HERE.parent / "datasets", root / "datasets")
        for _ in range(rounds):
            for name, tree in trees.items():
                for step, words in _steps(roots[name]).items():
                    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
                    command = [sys.executable, "-m", "tlcapture", *words, "--experiment", "bench", "--traits", trait]
                    start = time.perf_counter()
                    subprocess.run(command, check=True, cwd=roots[name], env=environment, capture_output=True)
                    times[name].setdefault(step, []).append(time.perf_counter() - start)
    steps = list(dict.fromkeys(step for found in times.values() for step in found))
    click.echo(f"{trait}, all layers, three methods; medians of alternating processes, in seconds\n")
    click.echo(f"| | {' | '.join(steps)} |\n|{' --- |' * (1 + len(steps))}")
    for name, found in times.items():
        cells = [f"{statistics.median(found[step]):.1f}" if step in found else "" for step in steps]
        click.echo(f"| {name} | {' | '.join(cells)} |")


def _steps(root: Path) -> dict[str, list[str]]:
    components = ("residual", "attn_out")
    steps = {"extract": ["extract"]}
    if not any((root / "experiments").glob("bench/extraction/*reference.pt")):
        steps["evaluate, first (reference)"] = ["evaluate"]
    return steps | {f"evaluate {each}": ["evaluate", "--component", each] for each in components}


def _measure(name: str, variant: str) -> dict[str, float]:
    from joblib import Parallel, delayed

    from tlcapture.extraction import readout
    from tlcapture.extraction.examples import read_examples
    from tlcapture.extraction.methods import FITS
    from tlcapture.extraction.prepared_examples import prepare_examples
    from tlcapture.models.loading import load_model
    from tlcapture.names import Trait
    from tlcapture.storage.experiments.datasets import Datasets
    from tlcapture.storage.experiments.layout import Layout

    model, trait = load_model("smollm2", device="cpu"), Trait.parse(name)
    datasets = Datasets(Path())
    prepared = prepare_examples(Layout(Path(), "none"), model, read_examples(datasets, trait))
    before = _peak()
    if variant == VARIANTS[0]:
        readout.shared_prefix = lambda readings: 0
    start = time.perf_counter()
    activations = readout.read_out(model, prepared.readings, ["residual", "attn_out"])
    read = time.perf_counter()
    for values in activations.values():
        for fit in FITS.values():
            fit(values, prepared.labels)
    fitted, peak = time.perf_counter(), _peak()
    FITS["probe"](activations["residual"], prepared.labels)
    in_turn = time.perf_counter()
    layers = [activations["residual"][layer : layer + 1] for layer in range(model.n_layers)]
    Parallel(n_jobs=2)(delayed(FITS["probe"])(layer, prepared.labels) for layer in layers)
    return {
        "read_out": read - start,
        "fit": fitted - read,
        "peak": peak,
        "model": before,
        "in_turn": in_turn - fitted,
        "processes": time.perf_counter() - in_turn,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
