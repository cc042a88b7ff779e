"""Measure what many prompts cost: CPU time per prompt, less the start, of each command at several sizes.

    python benchmarks/many_prompts.py [--sizes 1000,3000,10000] [--traits 10] [--format json] [--rounds 3] [--browser]

A tiny random Llama captures prompts of a few tokens with one new token each, projected onto ten traits; the prompts are
then listed, skipped, projected again, and opened in Python and on the page. Each measurement is a fork of a process
that has imported everything and done the same work with one prompt, so that the start is small and the same; that of
one prompt is subtracted. What was imported is left out of garbage collections, which would go through it in some forks.
Figures are the least of several rounds with the sizes in turn; captures, and what takes over 20 s, are measured once.
With `--browser --only nothing --folder DIR` the first view alone is timed, of sets that were captured before.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NoReturn

import click

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TLCAPTURE_WRITERS": "1"}
TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP), str(TOP / "benchmarks")]

from scale_cost import _make_model  # noqa: E402

CAPTURE = "`capture`"
LONG = 20  # seconds


@dataclass(frozen=True)
class Root:
    """A root with one prompt set of some prompts and vectors of some traits; `measure` fills it."""

    folder: Path
    model: Path
    count: int
    traits: int
    form: str

    def make(self) -> None:
        """Write the prompt set and the vectors, unless they are there."""
        inference = self.folder / "datasets" / "inference"
        if inference.is_dir():
            return
        inference.mkdir(parents=True)
        prompts = [{"id": number, "text": f"{number:06d}"} for number in range(1, self.count + 1)]
        (inference / "s.json").write_text(json.dumps({"name": "s", "prompts": prompts}))
        _vectors(self.folder, self.traits)

    @property
    def is_captured(self) -> bool:
        """Whether all prompts have been captured."""
        return self.count > 1 and (self.folder / "experiments" / "e" / ".locks" / "files-of-s.index").is_file()

    @property
    def work(self) -> dict[str, Callable[[], object]]:
        """What is measured, by its name in the table."""
        where = ["--experiment", "e", "--root", str(self.folder)]
        generated = ["--no-chat-template", "--max-new-tokens", "1", "--layer", "4"]
        capture = [
            "capture",
            *where,
            "--model",
            str(self.model),
            "--prompt-set",
            "s",
            *generated,
            "--format",
            self.form,
        ]
        capture += ["--temperature", "0", "--batch-size", "64"]
        project = ["project", *where, "--prompt-set", "s", "--format", self.form, "--layer", "4"]
        return {
            CAPTURE: lambda: _command(*capture),
            "`capture --skip-existing`": lambda: _command(*capture, "--skip-existing"),
            "`project`": lambda: _command(*project),
            "`project --skip-existing`": lambda: _command(*project, "--skip-existing"),
            "`list`": lambda: _command("list", *where),
            "`capture` of one further prompt": lambda: _command("capture", *where, "--prompt", "one", *generated),
            "the page's first view": self._page,
            "what stands out, on the page": self._overview,
            "`captures.values()`": lambda: self._experiment().captures("s").values(),
            "`to_pandas` of one trait": lambda: self._experiment().to_pandas("s", traits="tone/t0"),
        }

    def _experiment(self):  # type: ignore[no-untyped-def]
        from tlcapture import Experiment

        return Experiment("e", self.folder)

    def _page(self) -> None:
        from tlcapture.page.contents import Contents

        contents = Contents(self.folder)
        contents.root_folder()
        contents.experiments()
        contents.at_work("e", "s")
        contents.prompt_set("e", "s")
        contents.prompt("e", "s", "1")

    def _overview(self) -> None:
        from tlcapture.page.contents import Contents

        Contents(self.folder).overview("e", "s", "residual")

    def size(self) -> str:
        """Files and bytes of the experiment without its records of runs."""
        paths = [path for path in (self.folder / "experiments" / "e").rglob("*") if path.is_file()]
        found = [path for path in paths if not {"runs", "extraction", ".locks"} & set(path.parts)]
        total = sum(path.stat().st_size for path in found)
        index = sum(path.stat().st_size for path in paths if path.suffix == ".index")
        return (
            f"{self.count:,} prompts: {len(found):,} files, {len(found) / self.count:.2f} a prompt; "
            f"{total / self.count:,.0f} bytes a prompt; index {index / self.count:,.0f} bytes a prompt"
        )


@click.command()
@click.option("--sizes", default="1000,3000,10000", show_default=True)
@click.option("--traits", default=10, show_default=True)
@click.option("--format", "form", type=click.Choice(["json", "compact"]), default="compact", show_default=True)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--only", default="", help="Measure only the work whose name has this in it.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep what is captured in this folder; what is there already is not captured again.",
)
@click.option("--browser", is_flag=True, help="Also time the page's first view of the largest set in Chromium.")
def main(sizes: str, traits: int, form: str, rounds: int, only: str, folder: Path | None, browser: bool) -> None:
    """Measure and print a Markdown table."""
    counts = sorted(int(size) for size in sizes.split(","))
    with ExitStack() as stack:
        top = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = top / "model" if (top / "model").is_dir() else _make_model(top)
        roots = [Root(top / f"n{count}", model, count, traits, form) for count in (1, *counts)]
        for root in roots:
            root.make()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            for name, work in roots[0].work.items():
                if only in name:
                    work()
        gc.collect()
        gc.freeze()
        found = _measured(roots, rounds, only)
        for line in _table(roots, found):
            click.echo(line)
        for root in roots[1:]:
            click.echo(root.size())
        if not only and len(roots) > 2:
            click.echo(f"system calls on files for each skipped prompt: {_system_calls(roots[1], roots[2]):.2f}")
        if browser:
            click.echo(_in_browser(roots[-1], rounds))


def _measured(roots: Sequence[Root], rounds: int, only: str) -> dict[tuple[str, int], float]:
    """CPU seconds by work and number of prompts."""
    found: dict[tuple[str, int], float] = {}
    for number in range(rounds):
        for root in roots:
            for name, work in root.work.items():
                if (
                    only not in name
                    or (name == CAPTURE and (number or root.is_captured))
                    or found.get((name, root.count), 0) > LONG
                ):
                    continue
                seconds = _cpu_seconds(work)
                _note(f"round {number + 1}, {root.count:,} prompts, {name}: {seconds:.2f} s")
                found[name, root.count] = min(seconds, found.get((name, root.count), seconds))
    return found


def _table(roots: Sequence[Root], found: dict[tuple[str, int], float]) -> list[str]:
    counts = [root.count for root in roots[1:]]
    heads = " | ".join(f"ms a prompt, {count:,}" for count in counts)
    lines = [f"| work | one prompt, s | {heads} | ratio |", "| --- | --- |" + " --- |" * (len(counts) + 1)]
    for name in roots[0].work:
        if any((name, count) not in found for count in (1, *counts)):
            continue
        start = found[name, 1]
        each = [1e3 * (found[name, count] - start) / (count - 1) for count in counts]
        cells = " | ".join(f"{ms:.3f}" for ms in each)
        lines.append(f"| {name} | {start:.2f} | {cells} | {each[-1] / each[0]:.2f} |")
    return lines


def _cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a fork that does some work, and of the processes that it starts."""
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if not process:
            _do_and_exit(work, output.fileno())
        _, status, usage = os.wait4(process, 0)
        if status:
            output.seek(0)
            raise click.ClickException(output.read().decode()[-2000:])
    return usage.ru_utime + usage.ru_stime


def _do_and_exit(work: Callable[[], object], output: int) -> NoReturn:
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        work()
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)


def _command(*words: str) -> None:
    from tlcapture.cli.main import main as tlcapture

    try:
        tlcapture(list(words))
    except SystemExit as end:
        if end.code:
            raise


def _system_calls(few: Root, many: Root) -> float:
    """Calls on files and descriptors for each prompt that is skipped: the difference of two sets of a size each."""
    calls = []
    for root in (few, many):
        path = root.folder / "calls"
        strace = ["strace", "-f", "-c", "-e", "trace=%file,%desc", "-o", str(path)]
        code = f"import sys; from pathlib import Path; sys.path[:0] = [{str(TOP)!r}, {str(TOP / 'benchmarks')!r}]\n"
        code += "import many_prompts as m; "
        code += f"m.Root(Path({str(root.folder)!r}), Path({str(root.model)!r}), 1, 1, {root.form!r})"
        subprocess.run(
            [*strace, sys.executable, "-c", f"{code}.work['`capture --skip-existing`']()"],
            check=True,
            capture_output=True,
        )
        calls.append(int(path.read_text().splitlines()[-1].split()[3]))
    return (calls[1] - calls[0]) / (many.count - few.count)


def _in_browser(root: Root, rounds: int) -> str:
    """The first view in new browsers and servers, which last until it is drawn."""
    import psutil
    from page_speed import first_view

    from tests.browser import Watched, browser, server

    def used() -> float:
        """Processor seconds of the browser and of the server, children of this process."""
        times = [each.cpu_times() for each in psutil.Process().children(recursive=True)]
        return sum(each.user + each.system for each in times)

    wall, processor = [], []
    for _ in range(rounds):
        with browser() as launched, server(root.folder, "e") as (base, _):
            page = Watched(launched.new_context(viewport={"width": 1366, "height": 900}), base)
            page.page.goto("about:blank")
            before = used()
            wall.append(first_view(page, base, "e"))
            processor.append(used() - before)
            if page.wrong:
                raise click.ClickException(f"errors on the page: {page.wrong[:3]}")
    return (
        f"first view of {root.count:,} prompts in Chromium: median {statistics.median(wall):.2f} s, at most "
        f"{max(wall):.2f} s; processor time of browser and server {statistics.median(processor):.2f} s"
    )


def _vectors(root: Path, traits: int) -> None:
    import torch

    for number in range(traits):
        folder = root / "experiments" / "e" / "extraction" / "tone" / f"t{number}" / "vectors"
        folder.mkdir(parents=True)
        torch.save(torch.randn(64, generator=torch.Generator().manual_seed(number)), folder / "probe_layer4.pt")


def _note(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
