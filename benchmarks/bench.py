"""Run all benchmarks of tlcapture and print their results as one table.

    python benchmarks/bench.py [--quick] [--rounds 5] [--only w1,w6] [--baseline DIR]

The compared implementations alternate within a run; results are medians of the ratios of each round, with their range.
The table is printed and, if all workloads ran in full, written to RESULTS.md above its remarks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

RESULTS = Path(__file__).parent / "RESULTS.md"
END_OF_TABLE = "<!-- what follows is written by hand -->"


@click.command()
@click.option("--quick", is_flag=True, help="Run two rounds of smaller workloads; do not write RESULTS.md.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--only", default="", help="Workloads to run, comma-separated; do not write RESULTS.md.")
@click.option(
    "--baseline",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another checkout, which W12 and W14 measure too.",
)
def main(quick: bool, rounds: int, only: str, baseline: Path | None) -> None:
    """Measure and print a Markdown table."""
    import capture_threads
    from generation_speed import Bench, accelerator, products, w1, w1_half, w2, w3, w4
    from launches import w13
    from long_context import flat
    from measure import HEAD, Row, machine
    from output_speed import w5, w6, w7, w8, w9, w10, w11
    from sampling_speed import NOT_MEASURED, large_vocabulary, processors, samples, sampling, w1_bridge, w1_sampled

    def w12(bench: Bench) -> Iterator[Row]:
        yield from capture_threads.w12(bench.rounds, capture_threads.trees_of(baseline))

    def w14(bench: Bench) -> Iterator[Row]:
        yield from capture_threads.w14(bench.rounds, capture_threads.trees_of(baseline), 200 if quick else 1000)

    slow = (w3, w1_half, w9, w10, w12, w14, w1_bridge)  # omitted from a quick run
    workloads = {work.__name__: work for work in (w1, w1_half, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14)}
    workloads |= {
        work.__name__: work for work in (w1_sampled, w1_bridge, large_vocabulary, sampling, processors, samples)
    }
    workloads |= {"flat": flat, "products": products, "gpu": accelerator}
    not_measured = {"gpu": ("GPU", "Gemma-2-2B's shape, ours / HF plain", "no GPU on this machine"), **NOT_MEASURED}
    chosen = [name.strip() for name in only.split(",") if name.strip()] or [
        name for name, work in workloads.items() if not (quick and work in slow)
    ]
    if unknown := [name for name in chosen if name not in workloads]:
        raise click.UsageError(f"no workload {', '.join(unknown)}: choose from {', '.join(workloads)}")
    bench = Bench(2 if quick else rounds, quick)
    lines = [f"{machine()}. {bench.rounds} rounds.", "", HEAD]
    click.echo("\n".join(lines))
    for name in chosen:
        rows = [row.markdown() for row in workloads[name](bench)]
        if not rows:
            workload, what, why = not_measured[name]
            rows = [f"| {workload} | {what} | | | | | not measured: {why} | |"]
        click.echo("\n".join(rows))
        lines += rows
    if not quick and not only:
        _write("\n".join(lines))


def _write(table: str) -> None:
    remarks = RESULTS.read_text().split(END_OF_TABLE)[1] if RESULTS.exists() else "\n"
    RESULTS.write_text(f"# Results of `make bench`\n\n{table}\n\n{END_OF_TABLE}{remarks}")


if __name__ == "__main__":
    main()
