"""Measure what many prompts cost: CPU time per prompt, less the start, of each command at two sizes and their ratio.

    python benchmarks/many_prompts.py [--sizes 1000,10000] [--traits 10] [--format compact] [--profile DIR]

A tiny random Llama captures prompts of a few tokens with one new token each, projected onto ten traits; the prompts are
then listed, skipped, projected again, and opened in Python and on the page, each in a process of its own. The start is
that of the same command with one prompt. `--profile` keeps a profile of each process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import click

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP), str(TOP / "benchmarks")]

from scale_cost import _make_model  # noqa: E402

IN_PYTHON = {
    "page, first view": "c = Contents(root); c.experiments(); c.prompt_set('e', 's'); c.prompt('e', 's', '1')",
    "captures.values()": "Experiment('e', root).captures('s').values()",
    "to_pandas": "Experiment('e', root).to_pandas('s', traits='tone/t0')",
}
PRELUDE = """
import sys
from pathlib import Path
from tlcapture import Experiment
from tlcapture.page.contents import Contents
root = Path(sys.argv[1])
"""


@click.command()
@click.option("--sizes", default="1000,10000", show_default=True)
@click.option("--traits", default=10, show_default=True)
@click.option("--format", "form", type=click.Choice(["json", "compact"]), default="compact", show_default=True)
@click.option("--profile", type=click.Path(file_okay=False, path_type=Path), help="Keep profiles in this folder.")
def main(sizes: str, traits: int, form: str, profile: Path | None) -> None:
    """Measure and print a Markdown table."""
    counts = sorted(int(size) for size in sizes.split(","))
    with tempfile.TemporaryDirectory() as folder:
        model = _make_model(Path(folder))
        start = _measured(Path(folder) / "start", model, 1, traits, form, None)
        found = {n: _measured(Path(folder) / f"n{n}", model, n, traits, form, profile) for n in counts}
    heads = " | ".join(f"ms a prompt, {count:,}" for count in counts)
    click.echo(f"| work | start, s | {heads} | ratio |")
    click.echo("| --- | --- |" + " --- |" * (len(counts) + 1))
    for work, begin in start.items():
        each = [1e3 * (found[count][work] - begin) / (count - 1) for count in counts]
        click.echo(f"| {work} | {begin:.1f} | {' | '.join(f'{ms:.3f}' for ms in each)} | {each[-1] / each[0]:.2f} |")


def _measured(root: Path, model: Path, count: int, traits: int, form: str, profile: Path | None) -> dict[str, float]:
    """CPU seconds of each piece of work with `count` prompts."""
    inference = root / "datasets" / "inference"
    inference.mkdir(parents=True)
    prompts = [{"id": number, "text": f"{number:06d}"} for number in range(1, count + 1)]
    (inference / "s.json").write_text(json.dumps({"name": "s", "prompts": prompts}))
    _vectors(root, traits)
    where = ["--experiment", "e", "--root", str(root)]
    asked = [*where, "--model", str(model), "--prompt-set", "s", "--no-chat-template", "--max-new-tokens", "1"]
    asked += ["--temperature", "0", "--batch-size", "64", "--format", form, "--layer", "4"]
    commands = {
        "capture": ["-m", "tlcapture", "capture", *asked],
        "capture --skip-existing": ["-m", "tlcapture", "capture", *asked, "--skip-existing"],
        "list": ["-m", "tlcapture", "list", *where],
        "project": ["-m", "tlcapture", "project", *where, "--prompt-set", "s", "--format", form, "--layer", "4"],
        "capture one adhoc prompt": ["-m", "tlcapture", "capture", *where, "--prompt", "one", "--no-chat-template",
                                     "--max-new-tokens", "1", "--layer", "4"],
        **{work: ["-c", PRELUDE + code, str(root)] for work, code in IN_PYTHON.items()},
    }  # fmt: skip
    commands["project --skip-existing"] = [*commands["project"], "--skip-existing"]
    found = {}
    for work, words in commands.items():
        if work == "list":  # what the captures left behind
            paths = [path for path in (root / "experiments").rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in paths)
            index = sum(path.stat().st_size for path in paths if path.suffix == ".index")
            each = f"{len(paths) / count:.2f} files, {size / count:,.0f} bytes a prompt"
            click.echo(
                f"{count:,} prompts: {len(paths):,} files, {size:,} bytes; {each}; index {index:,} bytes", err=True
            )
        kept = None if profile is None else profile / f"{work.replace(' ', '_').replace(',', '')}-{count}.prof"
        found[work] = _cpu_seconds(words, kept)
    return found


def _vectors(root: Path, traits: int) -> None:
    import torch

    for number in range(traits):
        folder = root / "experiments" / "e" / "extraction" / "tone" / f"t{number}" / "vectors"
        folder.mkdir(parents=True)
        torch.save(torch.randn(64, generator=torch.Generator().manual_seed(number)), folder / "probe_layer4.pt")


def _cpu_seconds(words: list[str], profile: Path | None) -> float:
    """CPU seconds of a Python process and its children, with one thread."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    if profile is not None:
        profile.parent.mkdir(parents=True, exist_ok=True)
        if words[0] == "-c":
            script = profile.with_suffix(".py")
            script.write_text(words[1])
            words = [str(script), *words[2:]]
        words = ["-m", "cProfile", "-o", str(profile), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)}: {done.stdout[-500:]} {done.stderr[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
