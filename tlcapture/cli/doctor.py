"""`tlcapture doctor`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import options_of
from tlcapture.cli.options.model import MODEL_NAMES, EngineOptions
from tlcapture.cli.output.console import Console, one_line_errors
from tlcapture.cli.output.tables import Coloured, Column, echo_table

_COLUMNS = (Column(min_width=len("not applicable")), Column(min_width=len("raw basis")), Column())
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@command(
    "tlcapture doctor",
    "tlcapture doctor --engine bridge --dtype bfloat16",
)
@click.option("--model", default="smollm2", show_default=True, metavar="NAME", help=MODEL_NAMES)
@options_of(EngineOptions, "engine")
@one_line_errors
def doctor(model: str, engine: EngineOptions) -> None:
    """Check a model's activations against Hugging Face.

    One line per check: BOS, padding, stop ids, residuals and attention against Hugging Face, batched against single
    prompts, captured against recomputed activations, soft caps, the dtype's range. Exit status: 0 if all
    checks passed, 1 if one failed, 2 if the model cannot be loaded.
    """
    load = engine.loader(model, Console())
    load.require()
    from tlcapture.doctor.run import run_doctor

    failed = False
    for check in run_doctor(load):
        # A check can take minutes, so each row is printed when it is known.
        echo_table(_COLUMNS, [(Coloured(check.verdict, _COLOURS.get(check.verdict)), check.name, check.detail)])
        failed = failed or check.verdict == "failed"
    if not failed:
        named = [] if model == "smollm2" else ["--experiment", _experiment_for(model), "--model", model]
        click.echo("next: " + shlex.join(["tlcapture", "capture", *named, "--prompt", "How do tides work?"]))
    sys.exit(1 if failed else 0)


def _experiment_for(model: str) -> str:
    """A name for an experiment with a model: `default` usually belongs to the embedded model."""
    name = Path(model.rpartition("@")[0] or model).name.removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "mine"
