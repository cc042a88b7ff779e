"""Workloads W12 and W14: what a whole capture costs beside the model, of this checkout and of an earlier one.

    python benchmarks/capture_threads.py [--baseline DIR] [--rounds 3] [--prompts 1000]

Each checkout captures in processes of its own, and the two alternate. A capture has ten traits, each with a vector at a
layer of its own. W12 is the processor time of the main thread that is not spent in steps and unembedding of the model,
as a share of all its time; it hardly depends on what else the machine does. W14 is seconds, and needs two free
processors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from earlier_names import accept_earlier_names

_HERE = Path(__file__).resolve().parent
_FOUND = "found "
_TRAITS = 10
_NEW_TOKENS = 50
_TINY_PROMPTS = 200  # of W12


def w12(rounds: int, trees: dict[str, Path]) -> Iterator[Any]:
    """The share of the main thread's processor time that is not model work."""
    from measure import Row

    for model, n_prompts, must, aim in (("embedded", 10, 0.05, 0.03), ("tiny", _TINY_PROMPTS, 0.25, 0.1)):
        shares: dict[str, list[float]] = {name: [] for name in trees}
        for _ in range(rounds):
            for name, tree in trees.items():
                found = _measured(tree, model, n_prompts, project=True)
                shares[name].append(1 - found["model"] / found["main"])
        what = f"main thread's time that is not model work, {model} model, ten traits"
        note = "; ".join(f"{name} {sorted(each)[len(each) // 2]:.0%}" for name, each in shares.items())
        yield Row("W12", what, shares["new"], must, aim, note=note)


def w14(rounds: int, trees: dict[str, Path], n_prompts: int = 1000) -> Iterator[Any]:
    """Tiny prompts with ten traits, compared with the same capture without projections."""
    from measure import Row, medians, ratios

    for name, tree in trees.items():
        times: dict[str, list[float]] = {"ten traits": [], "--no-project": []}
        for _ in range(rounds):
            for kind, project in (("ten traits", True), ("--no-project", False)):
                times[kind].append(_measured(tree, "tiny", n_prompts, project=project)["seconds"])
        what = f"{n_prompts:,} tiny prompts, ten traits / --no-project"
        bounds: tuple[float | None, float | None] = (1.5, 1.2) if name == "new" else (None, None)
        figures = ratios(times, "ten traits", "--no-project")
        yield Row("W14", what if name == "new" else f"{what}, earlier", figures, *bounds, note=medians(times))


def trees_of(baseline: Path | None) -> dict[str, Path]:
    """This checkout, and the one to compare it with."""
    return {"new": _HERE.parent} | ({} if baseline is None else {"earlier": baseline.resolve()})


def _measured(tree: Path, model: str, n_prompts: int, *, project: bool) -> dict[str, float]:
    command = [sys.executable, str(_HERE / "capture_threads.py"), "--worker", str(tree), "--model", model]
    command += ["--prompts", str(n_prompts), *(["--project"] if project else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    for line in done.stdout.splitlines():
        if line.startswith(_FOUND):
            return json.loads(line.removeprefix(_FOUND))
    raise click.ClickException(f"a capture failed: {done.stderr[-800:]}")


def _work(tree: Path, model_name: str, n_prompts: int, *, project: bool) -> None:
    """Capture in this process with the package of a checkout, and print seconds."""
    sys.path[:0] = [str(tree), str(tree / "benchmarks")]
    import tlcapture

    if not Path(tlcapture.__file__).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"{tlcapture.__file__} is not in {tree}")
    accept_earlier_names()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        root = Path(folder)
        model = _model(root, model_name)
        names = [("warm", 2), ("measured", n_prompts)]
        for name, count in names:
            _make_prompts(root, name, count, model_name)
        _make_vectors(root, model)
        for name, _ in names:  # the first capture imports and sets up
            found = _captured(root, model, name, project=project)
    print(f"{_FOUND}{json.dumps(found)}", flush=True)


def _model(root: Path, name: str) -> Any:
    from tlcapture.models.loading import load_model

    if name == "embedded":
        return load_model("smollm2", device="cpu")
    from scale_cost import _make_model

    return load_model(str(_make_model(root)), device="cpu")


def _make_prompts(root: Path, name: str, count: int, model_name: str) -> None:
    from tlcapture.prompts.prompt_sets import read_prompt_set
    from tlcapture.storage.experiments.datasets import Datasets
    from tlcapture.storage.files import write_json

    texts = [f"{'x' * (number % 33)} {number:04d}" for number in range(count)]
    if model_name == "embedded":
        own = read_prompt_set(Datasets(root), "single_trait").prompts
        texts = [own[number % len(own)].text for number in range(count)]
    prompts = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    write_json(root / "datasets/inference" / f"{name}.json", {"name": name, "prompts": prompts})


def _make_vectors(root: Path, model: Any) -> None:
    import torch

    from tlcapture.names import Trait
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.vector_files import VectorFiles
    from tlcapture.traits.vectors import write_vector

    generator = torch.Generator().manual_seed(0)
    origin = {"extraction_model": model.name, "model_fingerprint": model.fingerprint}
    for number in range(_TRAITS):
        files = VectorFiles(Layout(root, "vectors"), Trait("bench", f"trait{number}"))
        layer = number * model.n_layers // _TRAITS
        write_vector(files, "residual", "probe", layer, torch.randn(model.d_model, generator=generator))
        files.write_metadata("residual", {**origin, "extraction_experiment": "vectors"})


def _captured(root: Path, model: Any, name: str, *, project: bool) -> dict[str, float]:
    from tlcapture.commands.capture import CaptureOptions, run_capture
    from tlcapture.generation.sampling.next_token import Sampling
    from tlcapture.prompts.prompt_sets import read_prompt_set
    from tlcapture.storage.experiments.datasets import Datasets
    from tlcapture.storage.experiments.layout import Layout
    from tlcapture.traits.choice import VectorChoice

    spent, depth = 0.0, 0

    def timed(work: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal spent, depth
            start, depth = time.thread_time(), depth + 1
            try:
                return work(*args, **options)
            finally:
                depth -= 1
                spent += 0.0 if depth else time.thread_time() - start

        return run

    class Load:
        name = model.name

        def __call__(self) -> Any:
            return model

    step, unembed = model.step, model.unembed
    model.step, model.unembed = timed(step), timed(unembed)
    options = CaptureOptions(
        project=project,
        vectors=VectorChoice(experiment="vectors") if project else VectorChoice(),
        max_new_tokens=_NEW_TOKENS,
        sampling=Sampling(temperature=0),
    )
    prompts = read_prompt_set(Datasets(root), name)
    main, seconds = time.thread_time(), time.perf_counter()
    report = run_capture(Layout(root, "bench"), [prompts], options, Load())  # type: ignore[arg-type]
    main, seconds = time.thread_time() - main, time.perf_counter() - seconds
    assert not report.failures, report.failures[:3]
    model.step, model.unembed = step, unembed
    return {"main": main, "model": spent, "seconds": seconds}


@click.command()
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The other checkout.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Rounds to measure.")
@click.option("--prompts", default=1000, show_default=True, type=click.IntRange(1), help="Prompts of W14.")
@click.option("--only", default="w12,w14", show_default=True)
@click.option("--worker", hidden=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", hidden=True)
@click.option("--project", hidden=True, is_flag=True)
def main(
    baseline: Path | None, rounds: int, prompts: int, only: str, worker: Path | None, model: str, project: bool
) -> None:
    """Measure and print a Markdown table."""
    if worker is not None:
        return _work(worker, model, prompts, project=project)
    from measure import HEAD

    click.echo(HEAD)
    trees = trees_of(baseline)
    for name, rows in (("w12", w12(rounds, trees)), ("w14", w14(rounds, trees, prompts))):
        if name in only.split(","):
            for row in rows:
                click.echo(row.markdown())


if __name__ == "__main__":
    main()
