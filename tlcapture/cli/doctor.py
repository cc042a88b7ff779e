"""`tlcapture doctor`."""

from __future__ import annotations

import sys

import click

from tlcapture.cli.console import Console, one_line_errors
from tlcapture.cli.options import HELP_NAMES, EngineOptions, engine_options
from tlcapture.text import printable

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command(context_settings=HELP_NAMES)
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="NAME",
    help="smollm2 (embedded), a folder of Hugging Face weights, or a hub name.",
)
@engine_options
@one_line_errors
def doctor(model: str, engine: EngineOptions) -> None:
    """Check a model's activations against Hugging Face.

    One line per check: BOS, padding, stop ids, residuals against Hugging Face, batched against single
    prompts, captured against recomputed activations, soft caps, the dtype's range. Exit status: 0 if all
    checks passed, 1 if one failed, 2 if the model cannot be loaded.
    """
    from tlcapture.doctor.run import run_doctor

    failed = False
    for check in run_doctor(engine.loader(model, Console())):
        click.secho(f"{check.verdict:<16}", fg=_COLOURS.get(check.verdict), nl=False)
        click.echo(printable(f"{check.name:<11}{check.detail}"))
        failed = failed or check.verdict == "failed"
    sys.exit(1 if failed else 0)
