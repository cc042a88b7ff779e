"""`tlcapture`: the commands together."""

from __future__ import annotations

import click

from tlcapture import __version__
from tlcapture.cli.capture import capture
from tlcapture.cli.doctor import doctor
from tlcapture.cli.evaluate import evaluate
from tlcapture.cli.extract import extract
from tlcapture.cli.project import project
from tlcapture.cli.shell import shell
from tlcapture.cli.steer import steer
from tlcapture.cli.traits import traits
from tlcapture.cli.view import view


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tlcapture")
def main() -> None:
    """Watch a language model think while it writes.

    Capture its activations token by token, and project them onto trait vectors.
    """


main.add_command(capture)
main.add_command(project)
main.add_command(extract)
main.add_command(evaluate)
main.add_command(steer)
main.add_command(view)
main.add_command(shell)
main.add_command(traits)
main.add_command(doctor)
