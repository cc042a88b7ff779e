"""`tlcapture doctor`."""

from __future__ import annotations

import sys

import click

from tlcapture.cli.console import Console, one_line_errors
from tlcapture.cli.options import engine_options
from tlcapture.text import printable

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="NAME",
    help="smollm2 (embedded), a folder of Hugging Face weights, or a hub name.",
)
@engine_options
@one_line_errors
def doctor(model: str, engine: str, device: str, n_devices: int, dtype: str) -> None:
    """Load a model and check that what is captured from it can be believed.

    A line each: BOS, padding, stop ids, residuals against Hugging Face, batch against single, captured
    against recomputed, soft caps, the dtype's range. Exit status: 0 all passed, 1 one failed, 2 the
    model cannot be loaded.
    """
    from tlcapture.doctor.run import run_doctor
    from tlcapture.runs.model_loader import ModelLoader

    failed = False
    for check in run_doctor(ModelLoader(model, Console(), engine, device, dtype, n_devices)):
        click.secho(f"{check.verdict:<16}", fg=_COLOURS.get(check.verdict), nl=False)
        click.echo(printable(f"{check.name:<11}{check.detail}"))
        failed = failed or check.verdict == "failed"
    sys.exit(1 if failed else 0)
