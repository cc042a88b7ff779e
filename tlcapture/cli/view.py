"""`tlcapture view`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.console import Console, one_line_errors
from tlcapture.cli.options import Names, experiment_option, root_option
from tlcapture.text import printable

if TYPE_CHECKING:
    from tlcapture.storage.layout import Layout


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@experiment_option
@click.option(
    "--prompt-set", type=Names(), help="Prompt sets: the first to open, or those to export or draw.  [default: all]"
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of 127.0.0.1.  [default: 8765, or any that is free]")
@click.option("--no-browser", is_flag=True, help="Serve the page without opening it.")
@click.option(
    "--export", type=click.Path(dir_okay=False, path_type=Path), help="Write one HTML file that needs no server."
)
@click.option(
    "--max-size",
    type=click.FloatRange(1),
    default=50.0,
    show_default=True,
    metavar="MB",
    help="Of the exported file's data.",
)
@click.option(
    "--png", type=click.Path(file_okay=False, path_type=Path), help="Write pictures of each prompt into a folder."
)
@root_option
@one_line_errors
def view(
    experiment: str,
    prompt_set: tuple[str, ...] | None,
    port: int | None,
    no_browser: bool,
    export: Path | None,
    max_size: float,
    png: Path | None,
    root: Path,
) -> None:
    """Look at captures in the browser: trajectories, layers, logit lens, attention, vectors.

    Serves the page on this machine alone, until Ctrl-C.
    """
    from tlcapture.errors import InputError
    from tlcapture.storage.layout import Layout

    if (export or png) and port is not None:
        raise click.UsageError("--port goes with serving, not with --export or --png")
    layout = Layout(root, experiment)
    layout.check_exists()
    captured = layout.prompt_sets()
    chosen = prompt_set or tuple(captured)
    for name in chosen:
        if name not in captured:
            there = ", ".join(captured) or "none"
            raise InputError(
                f"experiment {experiment!r} has no captures of prompt set {name!r}; captured sets: {there}"
            )
    if export is not None:
        _export(root, experiment, chosen, export, max_size)
    if png is not None:
        _draw(layout, chosen, png, all_asked_for=prompt_set is not None)
    if export is None and png is None:
        _serve(root, experiment, prompt_set, port, open_browser=not no_browser)


def _export(root: Path, experiment: str, prompt_sets: tuple[str, ...], target: Path, megabytes: float) -> None:
    from tlcapture.page.export import export_page
    from tlcapture.text import format_bytes

    left_out = export_page(root, experiment, prompt_sets, target, megabytes=megabytes)
    click.echo(f"wrote {target} ({format_bytes(target.stat().st_size)})")
    for label in left_out:
        click.secho(f"left out, over --max-size {megabytes:g}: {label}", fg="yellow", err=True)


def _draw(layout: Layout, prompt_sets: tuple[str, ...], folder: Path, *, all_asked_for: bool) -> None:
    """A prompt set without projections is an error only where it was asked for, or where none has any."""
    from tlcapture.commands.pictures import write_pictures
    from tlcapture.errors import InputError

    refused = []
    for name in prompt_sets:
        try:
            written = write_pictures(layout, name, layout.prompt_ids(name), folder, display=Console())
        except InputError as error:
            refused.append(error)
            if all_asked_for or len(refused) == len(prompt_sets):
                raise
            Console().warn(str(error))
            continue
        click.echo(f"wrote {len(written)} pictures of {name} in {folder}")


def _serve(
    root: Path, experiment: str, prompt_set: tuple[str, ...] | None, port: int | None, *, open_browser: bool
) -> None:
    import webbrowser
    from urllib.parse import urlencode

    from tlcapture.page.server import HOST, listen, serve

    listening = listen(port)
    state = {"experiment": experiment, **({"set": prompt_set[0]} if prompt_set else {})}
    address = f"http://{HOST}:{listening.getsockname()[1]}/#{urlencode(state)}"
    click.echo(printable(f"{experiment} at {address}  (Ctrl-C ends)"))
    if open_browser and not webbrowser.open(address):
        click.echo("no browser could be opened: open the address in one", err=True)
    serve(root, listening)
