"""Measure the page on a large experiment: time to the first view and of navigation, memory of browser and server.

    python benchmarks/page_speed.py [--prompts 200] [--rounds 5]

One prompt is captured by the embedded model with attention and logit lens and projected onto ten traits. Hard links to
its files serve as the files of all other prompts of the set.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' browser

from tests.browser import Watched, browser, server
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import write_vector

N_TRAITS = 10
MEGA = 2**20


@click.command()
@click.option("--prompts", default=200, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(prompts: int, rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make_experiment(root, prompts)
        click.echo(f"{prompts} prompts, {N_TRAITS} traits, attention of 30 layers: {size / 2**30:.2f} GiB of JSON")
        with server(root, "big") as (base, process), browser() as launched:
            # `psutil` sees the browser as a child of this process.
            page = Watched(launched.new_context(viewport={"width": 1366, "height": 900}), base)
            first = [first_view(page, base) for _ in range(rounds)]
            click.echo(f"first view: median {statistics.median(first):.2f} s ({min(first):.2f} to {max(first):.2f})")
            before = resident(process.pid)
            for view in ("dynamics", "layers", "lens", "attention", "vectors", "compare"):
                moves = [navigate(page, view, number % prompts + 1) for number in range(10)]
                click.echo(f"another prompt in {view}: median {statistics.median(moves) * 1000:.0f} ms")
            click.echo(f"browser, after these: {memory_of(page)}")
            memory = []
            for number in range(1, prompts + 1):
                navigate(page, "attention" if number % 2 else "lens", number)
                memory.append(resident(process.pid))
            click.echo(f"browser, after attention and logit lens of {prompts} prompts: {memory_of(page)}")
            quarter = max(1, len(memory) // 4)
            growth = statistics.mean(memory[-quarter:]) / statistics.mean(memory[quarter : 2 * quarter] or memory)
            click.echo(
                f"server: {before / MEGA:.0f} MiB at first, at most {max(memory) / MEGA:.0f} MiB over all; "
                f"last quarter / second: {growth:.3f}"
            )
            if page.wrong:
                raise SystemExit(f"errors on the page: {page.wrong[:3]}")


def make_experiment(root: Path, prompts: int) -> int:
    """Create the experiment `big`; returns the total size of its JSON files in bytes."""
    from tlcapture.cli.main import main as command

    layout = Layout(root, "big")
    generator = torch.Generator().manual_seed(0)
    for number in range(N_TRAITS):
        folder = VectorFiles(layout, Trait("bench", f"trait{number}"))
        write_vector(folder, "residual", "probe", 16, torch.randn(576, generator=generator))
    words = ["capture", "--experiment", "big", "--root", str(root), "--prompt-set", "single_trait", "--limit", "1"]
    try:
        command([*words, "--attention", "--logit-lens", "--temperature", "0"])
    except SystemExit as end:
        if end.code:
            raise
    total = 0
    for path in list(layout.folder.rglob("*/single_trait/1*")):
        for number in range(1, prompts + 1):
            copy = path.with_name(str(number) + path.name[1:])
            if number > 1:
                os.link(path, copy)
            total += path.stat().st_size * (path.suffix == ".json")
    return total


def first_view(page: Watched, base: str, experiment: str = "big") -> float:
    """Seconds from requesting the page in a new document until its first view is drawn."""
    page.page.goto("about:blank")
    start = time.perf_counter()
    page.page.goto(f"{base}#experiment={experiment}")
    page.settled()
    return time.perf_counter() - start


def navigate(page: Watched, view: str, prompt: int) -> float:
    """Seconds to switch to a view of a prompt."""
    start = time.perf_counter()
    page.open(f"experiment=big&set=single_trait&view={view}&prompt={prompt}&token=60")
    return time.perf_counter() - start


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(psutil.Process(pid).memory_info().rss)


def memory_of(page: Watched) -> str:
    return f"{resident_browser() / MEGA:.0f} MiB, of which the page's script {heap(page):.0f} MiB"


def resident_browser() -> int:
    """Total resident memory of all processes of the browser in bytes."""
    children = psutil.Process().children(recursive=True)
    return sum(each.memory_info().rss for each in children if "chrom" in each.name())


def heap(page: Watched) -> float:
    """Heap memory of the page's script in MiB."""
    session: Any = page.page.context.new_cdp_session(page.page)
    metrics = session.send("Runtime.getHeapUsage")
    return float(metrics["usedSize"]) / MEGA


if __name__ == "__main__":
    main()
