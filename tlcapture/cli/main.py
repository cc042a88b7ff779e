"""`tlcapture`: the group of all commands. The module of a command is imported when the command is called."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from tlcapture.cli.command import Group
from tlcapture.text import did_you_mean, printable
from tlcapture.version import __version__

COMMANDS = {
    "capture": "Generate from prompts and capture activations.",
    "project": "Project saved captures onto trait vectors.",
    "extract": "Extract trait vectors from contrastive examples.",
    "evaluate": "Measure how well vectors separate held-out examples.",
    "steer": "Add trait vectors during generation and score the effect.",
    "compare": "Compare captures of two models on the same tokens.",
    "view": "View captures and vectors in the browser.",
    "shell": "Explore an experiment in IPython.",
    "list": "List experiments, their prompt sets, traits and runs.",
    "traits": "Check contrastive examples; list or import vectors.",
    "doctor": "Check a model's activations against Hugging Face.",
    "plan": "Estimate the size and time of a capture.",
    "export": "Write an experiment as a dataset that other tools open.",
    "import": "Recreate an experiment from an export.",
}
_MODULES = {"import": "import_experiment", "list": "list_experiments"}  # no module can have these names


class _OneLineError(click.ClickException):
    """An error of the command line as all others are shown: in one line, with exit status 2."""

    exit_code = 2

    def __init__(self, error: click.ClickException):
        super().__init__(_in_one_line(error))
        self._color = error.show_color

    def show(self, file: IO[Any] | None = None) -> None:
        click.secho(printable(f"error: {self.message}"), fg="red", err=file is None, file=file, color=self._color)


_SIGNS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}


@contextmanager
def _click_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.ClickException as error:
        raise _OneLineError(error) from None


def _in_one_line(error: click.ClickException) -> str:
    message = _in_plain_words(" ".join(error.format_message().split()).rstrip("."))
    if isinstance(error, click.NoSuchOption):
        message = f"no such option {error.option_name!r}{did_you_mean(error.option_name, error.possibilities or ())}"
    if message[1:2].islower():
        message = message[0].lower() + message[1:]
    is_of_click = isinstance(error, click.NoSuchOption | click.MissingParameter)
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    joint = " " if message.endswith("?") else ": "
    return f"{message}{joint}see '{ctx.command_path} --help'" if is_of_click and ctx is not None else message


def _in_plain_words(message: str) -> str:
    """What click says of numbers: `x>=1` is "at least 1", and an integer range is a whole number."""
    message = message.replace("is not a valid integer range", "is not a whole number")
    message = message.replace("is not a valid integer", "is not a whole number")
    message = re.sub("is not a valid float( range)?", "is not a number", message)
    message = re.sub(r"is not in the range (\S+)<=x<=(\S+)", r"is not from \1 to \2", message)
    message = re.sub(
        r"is not in the range x(>=?|<=?)(\S+)", lambda found: f"is not {_SIGNS[found[1]]} {found[2]}", message
    )
    return re.sub(
        r"is not in the range ([^\s<]+)<(=?)x<(=?)(\S+)",
        lambda found: f"is not {_SIGNS['>' + found[2]]} {found[1]} and {_SIGNS['<' + found[3]]} {found[4]}",
        message,
    )


class _Commands(Group):
    """Commands by name; each is defined in the module of its name."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _click_errors_in_one_line():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _click_errors_in_one_line():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = _MODULES.get(cmd_name, cmd_name)
        command: click.Command = getattr(importlib.import_module(f"tlcapture.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    examples=[
        'tlcapture capture --prompt "How do tides work?"',
        "tlcapture view",
        "tlcapture capture --help",
    ],
)
@click.version_option(__version__, prog_name="tlcapture")
def main() -> None:
    """Watch a language model think while it writes.

    Capture its activations token by token and project them onto trait vectors.
    """
