"""`tlcapture shell`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import options_of
from tlcapture.cli.options.shared import Location
from tlcapture.cli.output.console import one_line_errors
from tlcapture.errors import TlcaptureError
from tlcapture.text import printable

if TYPE_CHECKING:
    from tlcapture.explore.experiment import Experiment
    from tlcapture.models.loading import Model


@command(
    "tlcapture shell",
    "tlcapture shell --experiment my_exp",
)
@options_of(Location, "location")
@one_line_errors
def shell(location: Location) -> None:
    """Explore an experiment in IPython.

    It defines `exp`, `captures`, `model` (loaded on first use) and the magic %capture_prompt.
    """
    from tlcapture.explore.experiment import Experiment
    from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
    from tlcapture.models.lazy_model import LazyModel

    exp = Experiment(location.experiment, location.root)
    if importlib.util.find_spec("IPython") is None:
        raise TlcaptureError("the shell needs IPython: run 'pip install ipython'")
    own = exp.config.inference_model or exp.config.extraction_model
    model = LazyModel(lambda: _load(own, exp), own or EMBEDDED)
    _start({"exp": exp, "captures": exp.captures, "model": model}, _banner(exp))


def _banner(exp: Experiment) -> str:
    """The names that are defined, and three commands to try, for which this experiment has the data."""

    trait = next(iter(exp.traits), None)
    prompt_set = next(iter(exp.prompt_sets), None)
    colour = f" -t {trait}" if trait else ""
    tries = [f'%capture_prompt{colour} "How do tides work?"']
    if prompt_set is not None:
        prompt_id = exp.captures[prompt_set].keys()[0]
        tries.insert(0, f'cap = captures["{prompt_set}"]["{prompt_id}"]; cap.coloured({repr(trait) if trait else ""})')
        tries.append(f'exp.to_pandas("{prompt_set}")' if trait else "cap.logit_lens()")
    else:
        tries.insert(0, "exp")
        tries.append("cap.logit_lens()")
    lines = "\n".join(f"    {line}" for line in tries)
    return (
        f"\ntlcapture: {printable(repr(exp))}\nexp, captures and model are defined. Three things to try:\n\n{lines}\n\n"
    )


def _load(own: str | None, exp: Experiment) -> Model:
    """The experiment's model, or the one that a first capture would use."""
    from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
    from tlcapture.models.loading import load_model

    click.echo(f"loading {own or EMBEDDED} ...", err=True)
    return exp.model if own else load_model(EMBEDDED)


def _start(namespace: dict[str, Any], banner: str) -> None:
    from IPython.terminal.ipapp import TerminalIPythonApp
    from traitlets.config import Config

    config = Config()
    config.TerminalInteractiveShell.banner2 = banner
    app = TerminalIPythonApp.instance(config=config, user_ns=namespace)
    app.initialize([])
    session: Any = app.shell
    session.extension_manager.load_extension("tlcapture")
    session.set_custom_exc((TlcaptureError,), _one_line)
    app.start()


def _one_line(
    shell: Any, kind: type[BaseException], error: BaseException, traceback: Any, tb_offset: Any = None
) -> None:
    """Show an error of the package in one line, without a traceback."""

    click.secho(f"{kind.__name__}: {printable(str(error))}", fg="red", err=True)
