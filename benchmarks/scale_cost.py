"""Measure captures of 100, 1,000 and 5,000 prompts, and compare them with the estimates of `tlcapture plan`.

    python benchmarks/scale_cost.py [--sizes 100,1000,5000] [--write docs/scale.md]

A tiny random Llama captures residual stream and projections of short prompts with one thread. The rate of the second
size, in new tokens per second, predicts the duration of all runs; bytes are predicted only from the model's config and
the mean lengths. Seconds are those of the processor, which other work on the machine changes little. `--write` inserts
the table between the markers of a file.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

BEGIN, END = "<!-- make bench-scale -->", "<!-- end of make bench-scale -->"
TOP = Path(__file__).parents[1]
TRAITS = ("tone/loud", "tone/warm")
NEW_TOKENS = 40
_WIDTH = 118
VARIANTS = {
    "residual, projections": ("residual,projections", ()),
    "residual of 2 layers, one point, projections": (
        "residual,projections",
        ("--layers", "2,4", "--points", "residual_out"),
    ),
    "projections only": ("projections", ("--projections-only",)),
}


@click.command()
@click.option("--sizes", default="100,1000,5000", show_default=True)
@click.option(
    "--write",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file with the markers between which to insert the table.",
)
def main(sizes: str, write: Path | None) -> None:
    """Measure and print a Markdown table."""
    counts = sorted(int(size) for size in sizes.split(","))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = _make_model(root)
        _make_traits(root)
        _run(root, "extract", "--experiment", "vectors", "--model", model, "--traits", ",".join(TRAITS))
        lines = list(_tables(root, model, counts))
    text = "\n".join(lines)
    click.echo(text)
    if write is not None:
        before, _, rest = write.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _tables(root: Path, model: Path, counts: Sequence[int]) -> Iterator[str]:
    yield from textwrap.wrap(
        f"A Llama of 6 layers, d_model 64, random weights, float32, one of {os.cpu_count()} shared cores, torch "
        f"{version('torch')}. Prompts of 6 to 38 tokens, at most {NEW_TOKENS} new ones, two traits, batches of 16. "
        "Seconds are those of the processor.",
        _WIDTH,
    )
    yield ""
    yield "| captured | prompts | files | bytes predicted | measured | off by | seconds predicted | measured | off by |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    rates: dict[str, float] = {}
    startup = statistics.median(_capture(root, model, 1, ())["seconds"] for _ in range(3))
    for name, (views, options) in VARIANTS.items():
        sizes = counts if name == next(iter(VARIANTS)) else counts[:2]
        every = {count: _capture(root, model, count, options) for count in sizes}
        measured = every[sizes[min(1, len(sizes) - 1)]]
        rates[name] = measured["new_tokens"] / (measured["seconds"] - startup)
        kept = [word for word in options if word != "--projections-only"]
        for count, found in every.items():
            yield _row(name, count, found, _plan(root, model, count, views, found, rates[name], kept), startup)
    yield ""
    rates_text = "; ".join(f"{rate:.0f} per second ({name})" for name, rate in rates.items())
    yield from textwrap.wrap(
        f"Predicted seconds are {startup:.1f} for start-up (the median of three captures of one prompt) plus new "
        f"tokens divided by the rate measured with {counts[:2][-1]:,} prompts, so the rows with that many do not "
        f"test the prediction. Rates: {rates_text}. The overhead of calling a block's operations is "
        f"{_seconds_per_layer(model) * 1e3:.2f} ms per layer and step.",
        _WIDTH,
    )


def _row(name: str, count: int, found: dict[str, Any], plan: dict[str, Any], startup: float) -> str:
    n_bytes, seconds = found["files"]["bytes"], found["seconds"]
    predicted = startup + plan["worker_hours"] * 3600
    cells = (
        name, f"{count:,}", f"{found['files']['count']:,}", f"{plan['bytes'] / 1e6:.2f} MB", f"{n_bytes / 1e6:.2f} MB",
        f"{plan['bytes'] / n_bytes - 1:+.1%}", f"{predicted:.1f}", f"{seconds:.1f}", f"{predicted / seconds - 1:+.1%}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _capture(root: Path, model: Path, count: int, options: Sequence[str]) -> dict[str, Any]:
    """Capture `count` prompts and delete the files; returns the command's summary with mean lengths."""
    name = f"n{count}"
    texts = [f"{'x' * (number % 33)} {number:04d}" for number in range(count)]
    prompts = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    folder = root / "datasets" / "inference"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "prompts": prompts}))
    experiment = root / "experiments" / name
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = _run(
        root, "capture", "--experiment", name, "--model", model, "--prompt-set", name, "--no-chat-template",
        "--vector-experiment", "vectors", "--max-new-tokens", NEW_TOKENS, "--temperature", 0, "--batch-size", 16,
        "--layer", 4, "--json", *options,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    found["seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    files = [*experiment.glob("inference/tone/loud/residual_stream/*/*.json")]
    lengths = [json.loads(path.read_bytes()) for path in files]
    found["prompt_tokens"] = statistics.mean(each["prompt"]["n_tokens"] for each in lengths)
    found["response_tokens"] = statistics.mean(each["response"]["n_tokens"] for each in lengths)
    subprocess.run(["rm", "-r", str(experiment)], check=True)
    return found


def _plan(
    root: Path, model: Path, count: int, views: str, found: dict[str, Any], rate: float, options: Sequence[str]
) -> dict[str, Any]:
    output = _run(
        root, "plan", "--model", model, "--prompts", count, "--prompt-tokens", round(found["prompt_tokens"]),
        "--new-tokens", round(found["response_tokens"]), "--views", views, "--traits", len(TRAITS),
        "--tokens-per-second", rate, "--json", *options,
    )  # fmt: skip
    planned: dict[str, Any] = json.loads(output)
    return planned


def _run(root: Path, *words: object) -> str:
    """Run a tlcapture command in a separate process with one thread; returns its standard output."""
    environment = {**os.environ, "TLCAPTURE_ROOT": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tlcapture", *map(str, words)]
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _make_model(root: Path) -> Path:
    """A folder with a tiny random Llama and a tokenizer with one token per byte."""
    import torch
    import transformers

    sys.path.insert(0, str(TOP))
    from tests import tiny

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    folder = root / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _make_traits(root: Path) -> None:
    for name, words in zip(TRAITS, (("LOUD", "soft"), ("warm", "cold")), strict=True):
        folder = root / "datasets" / "traits" / name
        folder.mkdir(parents=True)
        for side, word in zip(("positive", "negative"), words, strict=True):
            rows = [{"pair": str(n), "prompt": f"say {n}", "response": f"{word} {n} {word}"} for n in range(10)]
            (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _seconds_per_layer(model_folder: Path) -> float:
    """Seconds per layer of the median step of a tiny model, which is the overhead of calling operations."""
    import torch

    from tlcapture.models.loading import load_model
    from tlcapture.views.residual import residual_hooks

    torch.set_num_threads(1)
    model = load_model(str(model_folder), device="cpu")
    hooks, state = frozenset(residual_hooks(model.n_layers, model.hook_names)), model.start(1)
    token, mask, times = torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.long), []
    for _ in range(100):
        start = time.perf_counter()
        model.step(token, mask, state, hooks, want_logits=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / model.n_layers


if __name__ == "__main__":
    main()
