"""`tlcapture`: the commands together. A command's module is imported when the command is called."""

from __future__ import annotations

import importlib

import click

from tlcapture.version import __version__

COMMANDS = {
    "capture": "Generate from prompts and capture what happens inside.",
    "project": "Project saved captures onto trait vectors.",
    "extract": "Extract trait vectors from contrastive examples.",
    "evaluate": "How well do vectors separate held-out examples?",
    "steer": "Does adding a vector move the model's words?",
    "view": "Look at captures and vectors in the browser.",
    "shell": "Explore an experiment in IPython.",
    "traits": "Check traits' examples; list the vectors chosen.",
    "doctor": "Can what is captured from a model be believed?",
    "plan": "What will capturing so many prompts cost?",
}


class _Commands(click.Group):
    """Commands by name, each in the module of that name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"tlcapture.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tlcapture")
def main() -> None:
    """Watch a language model think while it writes.

    Capture its activations token by token, and project them onto trait vectors.
    """
