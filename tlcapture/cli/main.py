"""`tlcapture`: the group of all commands. The module of a command is imported when the command is called."""

from __future__ import annotations

import importlib

import click

from tlcapture.cli.command import help_settings
from tlcapture.version import __version__

COMMANDS = {
    "capture": "Generate from prompts and capture activations.",
    "project": "Project saved captures onto trait vectors.",
    "extract": "Extract trait vectors from contrastive examples.",
    "evaluate": "Measure how well vectors separate held-out examples.",
    "steer": "Add trait vectors during generation and score the effect.",
    "view": "View captures and vectors in the browser.",
    "shell": "Explore an experiment in IPython.",
    "list": "List experiments, their prompt sets, traits and runs.",
    "traits": "Check contrastive examples; list or import vectors.",
    "doctor": "Check a model's activations against Hugging Face.",
    "plan": "Estimate the size and time of a capture.",
    "export": "Write an experiment as a dataset that others open.",
    "import": "Make an experiment of such a dataset.",
}
_MODULES = {"import": "import_experiment", "list": "list_experiments"}  # no module can have these names


class _Commands(click.Group):
    """Commands by name; each is defined in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=2)
            hint = f": did you mean {' or '.join(near)}?" if near else f": commands: {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = _MODULES.get(cmd_name, cmd_name)
        command: click.Command = getattr(importlib.import_module(f"tlcapture.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings=help_settings())
@click.version_option(__version__, prog_name="tlcapture")
def main() -> None:
    """Watch a language model think while it writes.

    Capture its activations token by token and project them onto trait vectors.
    """
