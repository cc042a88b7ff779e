"""Compare this checkout with another one, and direct calls of the model with steps of the generation loop.

    python benchmarks/driver.py --baseline DIR [--rounds 7] [--only "step 1,w2"] [--processor-time]

DIR is a checkout of the revision to compare with (`git worktree add DIR REVISION`). Each checkout runs in a separate
process with the embedded model loaded, and the two alternate; results are medians of the ratios of each round. On a
busy machine, use `--processor-time` to measure the CPU time of a single thread instead of wall-clock time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

_HERE = Path(__file__).resolve().parent
_SECONDS = "seconds "
_PROMPT, _STEPS, _GENERATED = 40, 50, 50
# Workloads of both checkouts, with the largest acceptable ratio, and workloads of this one alone.
_OLD_AND_NEW = {
    "step 1": (f"{_STEPS} steps of one prompt", 1.03),
    "step 10": (f"{_STEPS} steps of ten prompts", 1.03),
    "w1": ("W1, a capture of ten prompts", 1.03),
    "w2": ("W2, a capture of one prompt", 1.03),
}
_CALLS = {
    "run_with_cache": ("tl.run_with_cache(token, names, past_kv_cache) / the loop's step", "step 1"),
    "call": ("tl(token, past_kv_cache) / the loop's step", "step 1"),
    "generate": (f"tl.generate, {_GENERATED} tokens / as many of the loop", "loop"),
}


class Worker:
    """A process of one checkout, which runs a script's workloads and reports their durations."""

    def __init__(self, tree: Path, processor_time: bool, script: Path = Path(__file__)):
        command = [sys.executable, str(script), "--worker", str(tree.resolve())]
        environment = dict(os.environ)
        if processor_time:
            command.append("--processor-time")
            environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = "1"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, name: str) -> float:
        """Run a workload; returns its duration in seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_SECONDS):
                return float(line.removeprefix(_SECONDS))
        raise click.ClickException(f"a worker ended with exit status {self._process.wait()}")

    def end(self) -> None:
        """Wait for the process to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(tree: Path, clock: Callable[[], float]) -> None:
    """Run a worker, which reads names of workloads from standard input and writes durations to standard output."""
    sys.path[:0] = [str(tree), str(tree / "benchmarks")]
    import torch
    from generation_speed import Bench

    import tlcapture
    from tlcapture.views.residual import residual_hooks

    if not Path(tlcapture.__file__).resolve().is_relative_to(tree):
        raise SystemExit(f"{tlcapture.__file__} is not in {tree}")
    is_earlier = not (tree / "benchmarks" / "implementations.py").exists()  # the module was called rivals
    ours = import_module("rivals" if is_earlier else "implementations").ours
    bench = Bench(1, quick=False)
    model = bench.model
    hooks = frozenset(residual_hooks(model.n_layers, model.hook_names))
    names = sorted(hooks)

    def prompts(rows: int) -> torch.Tensor:
        return torch.randint(5, 1000, (rows, _PROMPT), generator=torch.Generator().manual_seed(0))

    def begun(rows: int) -> tuple[Any, torch.Tensor]:
        tokens, state = prompts(rows), model.start(rows)
        model.step(tokens, torch.ones_like(tokens), state, hooks, want_logits=False)
        return state, torch.ones(rows, 1, dtype=torch.long)

    def steps(rows: int, call: Callable[[Any, torch.Tensor], object]) -> Callable[[], object]:
        state, one = begun(rows)
        return lambda: [call(state, one) for _ in range(_STEPS)]

    def step(state: Any, one: torch.Tensor) -> object:
        return model.step(one, one, state, hooks, want_logits=True)

    def loop() -> None:
        tokens, state = prompts(1), model.start(1)
        for _ in range(_GENERATED):
            found = model.step(tokens, torch.ones_like(tokens), state, hooks, want_logits=True)
            assert found.logits is not None
            tokens = found.logits.argmax(dim=-1, keepdim=True)

    options: dict[str, Any] = {"max_new_tokens": _GENERATED, "do_sample": False, "stop_at_eos": False, "verbose": False}
    prepared: dict[str, Callable[[], Callable[[], object]]] = {
        "step 1": lambda: steps(1, step),
        "step 10": lambda: steps(10, step),
        "w1": lambda: lambda: ours(model, bench.task(10, 10)),
        "w2": lambda: lambda: ours(model, bench.task(1, 1)),
        "loop": lambda: loop,
        "run_with_cache": lambda: steps(
            1, lambda state, one: model.tl.run_with_cache(one, names_filter=names, past_kv_cache=state)
        ),
        "call": lambda: steps(1, lambda state, one: model.tl(one, past_kv_cache=state)),
        "generate": lambda: lambda: model.tl.generate(prompts(1), **options),
    }
    serve(lambda name: prepared[name](), clock)


def serve(prepare: Callable[[str], Callable[[], object]], clock: Callable[[], float]) -> None:
    """Read names of workloads from standard input, and write their durations to standard output."""
    for line in sys.stdin:
        run = prepare(line.strip())
        start = clock()
        run()
        print(f"{_SECONDS}{clock() - start}", flush=True)


@click.command()
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The other checkout.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds to measure.")
@click.option("--only", default="", help="Workloads to run, comma-separated.")
@click.option("--processor-time", is_flag=True, help="Measure CPU time on a single thread.")
@click.option("--worker", hidden=True, type=click.Path(exists=True, path_type=Path))
def main(baseline: Path | None, rounds: int, only: str, processor_time: bool, worker: Path | None) -> None:
    """Measure and print a Markdown table; without --baseline, only direct calls of the model.

    Workloads: step 1, step 10, w1, w2; run_with_cache, call, generate.
    """
    if worker is not None:
        return work(worker, time.process_time if processor_time else time.perf_counter)
    from measure import HEAD, Row, medians, ratios

    chosen = {name.strip() for name in only.split(",") if name.strip()} or {*_OLD_AND_NEW, *_CALLS}
    if unknown := chosen - {*_OLD_AND_NEW, *_CALLS}:
        raise click.UsageError(f"no workload {', '.join(unknown)}: choose from {', '.join([*_OLD_AND_NEW, *_CALLS])}")
    trees = {"new": _HERE.parent} | ({"old": baseline} if baseline is not None else {})
    workers = {name: Worker(tree, processor_time) for name, tree in trees.items()}
    click.echo(HEAD)
    try:
        for name, (what, must) in _OLD_AND_NEW.items():
            if name in chosen and baseline is not None:
                times = in_turn_by_worker({tree: (worker, name) for tree, worker in workers.items()}, rounds)
                row = Row("driver", f"{what}: new / old", ratios(times, "new", "old"), must, 1.0, note=medians(times))
                click.echo(row.markdown())
        for name, (what, beside) in _CALLS.items():
            if name in chosen:
                times = in_turn_by_worker({"call": (workers["new"], name), "loop": (workers["new"], beside)}, rounds)
                row = Row("user calls", what, ratios(times, "call", "loop"), 1.1, 1.0, note=medians(times))
                click.echo(row.markdown())
    finally:
        for each in workers.values():
            each.end()


def in_turn_by_worker(workloads: dict[str, tuple[Worker, str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each workload by round, the workloads alternating, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in workloads}
    for number in range(rounds + 1):
        for name, (worker, workload) in workloads.items():
            taken = worker.run(workload)
            if number:
                times[name].append(taken)
    return times


if __name__ == "__main__":
    main()
