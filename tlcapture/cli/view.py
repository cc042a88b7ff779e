"""`tlcapture view`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import option, options_of
from tlcapture.cli.options.shared import Location
from tlcapture.cli.options.types import Finite, LocalPath, PromptSets
from tlcapture.cli.output.console import Console, one_line_errors
from tlcapture.errors import InputError, StorageError
from tlcapture.text import counted, first_lines, format_bytes, printable

if TYPE_CHECKING:
    from tlcapture.storage.experiments.layout import Layout


@dataclass(frozen=True)
class _Settings:
    """The options of `view` alone."""

    prompt_set: tuple[str, ...] | None = option(
        "--prompt-set",
        type=PromptSets(),
        help="Prompt sets to export or draw; the page opens on the first one.  [default: all]",
    )
    port: int | None = option(
        "--port", type=click.IntRange(1, 65535), help="Port on 127.0.0.1.  [default: 8765, or any free port]"
    )
    no_browser: bool = option("--no-browser", is_flag=True, help="Serve the page without opening it.")
    read_only: bool = option("--read-only", is_flag=True, help="Disable notes, so that the page writes nothing.")
    export: Path | None = option(
        "--export", type=LocalPath(dir_okay=False), help="Write a single HTML file that needs no server."
    )
    max_size: float = option(
        "--max-size",
        type=Finite(1),
        default=50.0,
        show_default=True,
        metavar="MIB",
        help="Maximum size of the exported file's data.",
    )
    png: Path | None = option(
        "--png", type=LocalPath(file_okay=False), metavar="DIR", help="Write pictures of each prompt to a folder."
    )

    @property
    def serves(self) -> bool:
        """Whether the page is served: nothing is to be written instead."""
        return self.export is None and self.png is None


@command(
    "tlcapture view --experiment my_exp",
    "tlcapture view --experiment my_exp --export report.html",
)
@options_of(Location, "location")
@options_of(_Settings, "settings")
@one_line_errors
def view(location: Location, settings: _Settings) -> None:
    """View captures in the browser: trajectories, layers, logit lens, attention, vectors.

    Serves the page to this machine only, until Ctrl-C.
    """
    from tlcapture.storage.experiments.missing_captures import no_captures

    if not settings.serves and settings.port is not None:
        raise click.UsageError("--port applies to serving, not to --export or --png")
    layout = location.layout
    layout.check_exists()
    captured = layout.prompt_sets()
    chosen = settings.prompt_set or tuple(captured)
    for name in chosen:
        if name not in captured:
            raise no_captures(layout, name, captured)
    if not settings.serves and not captured and (settings.png or not layout.traits()):
        raise InputError(
            f"experiment {location.experiment!r} has no captures to show: make some with "
            f"{location.command('capture', '--prompt-set', 'NAME')}"
        )
    is_whole = settings.export is None or _export(location, chosen, settings.export, settings.max_size)
    if settings.png is not None:
        _draw(layout, chosen, settings.png, all_required=settings.prompt_set is not None)
    if settings.serves:
        _serve(location, settings)
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


def _serve(location: Location, settings: _Settings) -> None:
    import webbrowser
    from urllib.parse import urlencode

    from tlcapture.page.server import HOST, listen, serve

    listening = listen(settings.port)
    state = {"experiment": location.experiment, **({"set": settings.prompt_set[0]} if settings.prompt_set else {})}
    address = f"http://{HOST}:{listening.getsockname()[1]}/#{urlencode(state)}"
    click.echo(printable(f"{location.experiment} at {address}  (Ctrl-C to stop)"))
    if not settings.no_browser and not webbrowser.open(address):
        click.echo("cannot open a browser: open the address yourself", err=True)
    serve(location.root, listening, read_only=settings.read_only)
