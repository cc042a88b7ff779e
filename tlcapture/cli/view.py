"""`tlcapture view`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import options_of
from tlcapture.cli.options.shared import Location
from tlcapture.cli.options.types import Finite, NewPath, PromptSets
from tlcapture.cli.output.console import Console, one_line_errors
from tlcapture.errors import InputError, StorageError
from tlcapture.text import counted, first_lines, format_bytes, printable

if TYPE_CHECKING:
    from tlcapture.storage.experiments.layout import Layout


@command(
    "tlcapture view --experiment my_exp",
    "tlcapture view --experiment my_exp --export report.html",
)
@options_of(Location, "location")
@click.option(
    "--prompt-set",
    type=PromptSets(),
    help="Prompt sets to export or draw; the page opens on the first one.  [default: all]",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port on 127.0.0.1.  [default: 8765, or any free port]")
@click.option("--no-browser", is_flag=True, help="Serve the page without opening it.")
@click.option("--read-only", is_flag=True, help="Disable notes, so that the page writes nothing.")
@click.option("--export", type=NewPath(dir_okay=False), help="Write a single HTML file that needs no server.")
@click.option(
    "--max-size",
    type=Finite(1),
    default=50.0,
    show_default=True,
    metavar="MIB",
    help="Maximum size of the exported file's data.",
)
@click.option("--png", type=NewPath(file_okay=False), metavar="DIR", help="Write pictures of each prompt to a folder.")
@one_line_errors
def view(
    location: Location,
    prompt_set: tuple[str, ...] | None,
    port: int | None,
    no_browser: bool,
    read_only: bool,
    export: Path | None,
    max_size: float,
    png: Path | None,
) -> None:
    """View captures in the browser: trajectories, layers, logit lens, attention, vectors.

    Serves the page to this machine only, until Ctrl-C.
    """
    from tlcapture.storage.experiments.missing_captures import no_captures
    from tlcapture.storage.remote.roots import check_local

    if (export or png) and port is not None:
        raise click.UsageError("--port applies to serving, not to --export or --png")
    check_local(export, "--export")
    check_local(png, "--png")
    layout = location.layout
    layout.check_exists()
    captured = layout.prompt_sets()
    chosen = prompt_set or tuple(captured)
    for name in chosen:
        if name not in captured:
            raise no_captures(layout, name, captured)
    if (export or png) and not captured and (png or not layout.traits()):
        raise InputError(
            f"experiment {location.experiment!r} has no captures to show: make some with "
            f"{location.command('capture', '--prompt-set', 'NAME')}"
        )
    is_whole = export is None or _export(location, chosen, export, max_size)
    if png is not None:
        _draw(layout, chosen, png, all_required=prompt_set is not None)
    if export is None and png is None:
        _serve(location, prompt_set, port, open_browser=not no_browser, read_only=read_only)
    if not is_whole:
        raise SystemExit(1)


def _export(location: Location, prompt_sets: tuple[str, ...], target: Path, mebibytes: float) -> bool:
    """Export the page; returns whether every file could be read, apart from raw files that may be another tool's."""
    from tlcapture.page.export import export_page

    problems: dict[str, None] = {}
    unread: dict[str, None] = {}
    told = {"on_problem": problems.setdefault, "on_unread": unread.setdefault}
    left_out = export_page(location.root, location.experiment, prompt_sets, target, mebibytes=mebibytes, **told)
    click.echo(f"wrote {target} ({format_bytes(target.stat().st_size)})")
    for label in first_lines(left_out):
        click.secho(f"left out, over --max-size {mebibytes:g}: {label}", fg="yellow", err=True)
    for problem in first_lines(list(unread)):
        click.secho(printable(f"not shown: {problem}"), fg="yellow", err=True)
    for problem in first_lines(list(problems)):
        Console().error(f"failed: {problem}")
    return not problems


def _draw(layout: Layout, prompt_sets: tuple[str, ...], folder: Path, *, all_required: bool) -> None:
    """Draw prompt sets; one without projections is an error if all are required, or if no set has any."""
    from tlcapture.commands.pictures import write_pictures

    refused, damaged = [], []
    for name in prompt_sets:
        try:
            written = write_pictures(layout, name, layout.prompt_ids(name), folder, display=Console())
        except InputError as error:
            refused.append(error)
            if all_required or len(refused) == len(prompt_sets):
                raise
            Console().warn(str(error))
            continue
        except StorageError as error:
            damaged.append(str(error))
            continue
        click.echo(f"wrote {counted(len(written), 'picture')} of {name} in {folder}")
    if damaged:
        raise StorageError("; ".join(damaged))


def _serve(
    location: Location, prompt_set: tuple[str, ...] | None, port: int | None, *, open_browser: bool, read_only: bool
) -> None:
    import webbrowser
    from urllib.parse import urlencode

    from tlcapture.page.server import HOST, listen, serve

    listening = listen(port)
    state = {"experiment": location.experiment, **({"set": prompt_set[0]} if prompt_set else {})}
    address = f"http://{HOST}:{listening.getsockname()[1]}/#{urlencode(state)}"
    click.echo(printable(f"{location.experiment} at {address}  (Ctrl-C to stop)"))
    if open_browser and not webbrowser.open(address):
        click.echo("cannot open a browser: open the address yourself", err=True)
    serve(location.root, listening, read_only=read_only)
