"""Compare `project` of this checkout with that of another one.

    python benchmarks/projection_cost.py --baseline DIR [--rounds 7] [--only "tiny"] [--profile]

DIR is a checkout of the revision to compare with (`git worktree add DIR REVISION`); 62c4111d is the last one without
chance levels. Each checkout projects captures of random activations, with prompts and responses of many lengths, onto
ten traits in a process of its own. The processes alternate and write new files each time; results are medians of the
ratios of each round. The first row of a shape has all vectors at one layer, the second every vector at a layer of its
own. This checkout has a reference of ordinary prompts, as `evaluate` leaves it, so that its random directions are
measured in full. `--profile` prints where this checkout spends its time instead.
"""

from __future__ import annotations

import cProfile
import pstats
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from driver import Worker, in_turn_by_worker, serve
from earlier_names import accept_earlier_names

_HERE = Path(__file__).resolve().parent
_SHAPES = {"tiny": (10, 64), "smollm2": (30, 576), "gemma-2-2b": (26, 2304)}  # layers and width
_CAPTURES, _TRAITS, _REFERENCE_PROMPTS = 20, 10, 51
_MUST, _AIM = 1.2, 1.1


def work(tree: Path, clock: Callable[[], float]) -> None:
    """Run a worker of a checkout (see `driver`), whose workloads are `{shape} one` and `{shape} many`."""
    sys.path[:0] = [str(tree)]
    import tlcapture

    if not Path(tlcapture.__file__).resolve().is_relative_to(tree):
        raise SystemExit(f"{tlcapture.__file__} is not in {tree}")
    accept_earlier_names()
    memory = Path("/dev/shm")  # the time that a disk takes for a file varies more than what is compared
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        made: dict[str, Callable[[], object]] = {}

        def prepare(name: str) -> Callable[[], object]:
            if name not in made:
                shape, layers = name.rsplit(" ", 1)
                made[name] = _project(Path(folder) / name.replace(" ", "_"), *_SHAPES[shape], layers == "many")
            shutil.rmtree(_written(Path(folder) / name.replace(" ", "_")), ignore_errors=True)
            return made[name]

        serve(prepare, clock)


def _written(root: Path) -> Path:
    """The folder of the projections."""
    return root / "experiments" / "bench" / "inference" / "bench"


def _project(root: Path, n_layers: int, d_model: int, at_many_layers: bool) -> Callable[[], object]:
    """Make captures and vectors; returns a function that projects them."""
    import torch

    from tlcapture.commands.project import ProjectOptions, run_project
    from tlcapture.names import Trait
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.statistics.reference import Reference
    from tlcapture.traits.vector_files import VectorFiles
    from tlcapture.traits.vectors import write_vector

    layout, generator = Layout(root, "bench"), torch.Generator().manual_seed(0)
    for number in range(_CAPTURES):
        _save_capture(layout, str(number), (n_layers, d_model), (20 + 3 * number, 50 - number % 5), generator)
    for number in range(_TRAITS):
        files = VectorFiles(layout, Trait("bench", f"trait{number}"))
        layer = (number * n_layers) // _TRAITS if at_many_layers else n_layers // 2
        write_vector(files, "residual", "probe", layer, torch.randn(d_model, generator=generator))
        origin = {"extraction_model": "bench", "extraction_experiment": "bench"}
        files.write_metadata("residual", {**origin, "methods": ["probe"], "layers": [layer]})
    means = torch.randn(2, n_layers, _REFERENCE_PROMPTS, d_model, generator=generator)
    prompts = [str(number) for number in range(_REFERENCE_PROMPTS)]
    Reference("bench", "bench", prompts, *means.unbind()).write(layout, "residual")

    def project() -> None:
        report = run_project(layout, ["bench"], ProjectOptions())
        assert report.n_files == _CAPTURES * _TRAITS and not report.failures, report

    return project


def _save_capture(layout: Any, name: str, shape: tuple[int, int], n_tokens: tuple[int, int], generator: Any) -> None:
    import torch

    from tlcapture.captures.capture import Capture, CapturedPart
    from tlcapture.views.residual import ResidualStream

    n_layers, d_model = shape
    parts = []
    for n in n_tokens:
        points = torch.randn(2 * n_layers + 1, n, d_model, generator=generator).cumsum(dim=0).to(torch.float16)
        tokens = [f" {number}" for number in range(n)]
        parts.append(CapturedPart("".join(tokens), tokens, list(range(n)), ResidualStream(points)))
    metadata = {
        "inference_model": "bench",
        "inference_experiment": "bench",
        "prompt_set": "bench",
        "prompt_id": name,
        "prompt_text": parts[0].text,
        "n_layers": n_layers,
        "d_model": d_model,
    }
    Capture(parts[0], parts[1], metadata).save(layout.residual("bench", name))


@click.command()
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The other checkout.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds to measure.")
@click.option("--only", type=click.Choice(list(_SHAPES)), help="One shape alone.")
@click.option("--processor-time", is_flag=True, help="Measure CPU time on a single thread.")
@click.option("--profile", is_flag=True, help="Print a profile of this checkout.")
@click.option("--worker", hidden=True, type=click.Path(exists=True, path_type=Path))
def main(
    baseline: Path | None, rounds: int, only: str | None, processor_time: bool, profile: bool, worker: Path | None
) -> None:
    """Measure and print a Markdown table."""
    if worker is not None:
        return work(worker, time.process_time if processor_time else time.perf_counter)
    names = [f"{shape} {layers}" for shape in ([only] if only else _SHAPES) for layers in ("one", "many")]
    if profile:
        return _profile(names)
    if baseline is None:
        raise click.UsageError("expected --baseline DIR, a checkout to compare with, or --profile")
    from measure import HEAD, Row, medians, ratios

    trees = {"new": _HERE.parent, "old": baseline}
    workers = {name: Worker(tree, processor_time, Path(__file__)) for name, tree in trees.items()}
    click.echo(HEAD)
    try:
        for name in names:
            times = in_turn_by_worker({tree: (each, name) for tree, each in workers.items()}, rounds)
            what = f"{_CAPTURES} captures onto {_TRAITS} traits, {name} layer{'s' * name.endswith('many')}: new / old"
            row = Row("project", what, ratios(times, "new", "old"), _MUST, _AIM, note=medians(times))
            click.echo(row.markdown())
    finally:
        for each in workers.values():
            each.end()


def _profile(names: list[str]) -> None:
    sys.path[:0] = [str(_HERE.parent)]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            shape, layers = name.rsplit(" ", 1)
            project = _project(Path(folder) / name.replace(" ", "_"), *_SHAPES[shape], layers == "many")
            project()
            with cProfile.Profile() as profiler:
                project()
            click.echo(f"## {name}")
            pstats.Stats(profiler).sort_stats("cumulative").print_stats("tlcapture|numpy|torch", 40)


if __name__ == "__main__":
    main()
