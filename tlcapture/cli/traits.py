"""`tlcapture traits`: check contrastive examples, list the selected vectors, and import those of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.console import Console, one_line_errors
from tlcapture.cli.option_types import OneTrait, Traits
from tlcapture.cli.options import HELP_NAMES, Location, examples_as_option, location_options, root_option
from tlcapture.cli.tables import Column, echo_table
from tlcapture.cli.work import working
from tlcapture.names import Trait
from tlcapture.text import printable

if TYPE_CHECKING:
    from tlcapture.extraction.checks import Check

_trait_option = click.option(
    "--traits", "chosen", type=Traits(), default="all", show_default=True, help="Traits to check."
)


@click.group(context_settings=HELP_NAMES)
def traits() -> None:
    """Check the contrastive examples of traits, list the selected vectors, and import those of other tools."""


@traits.command(context_settings=HELP_NAMES)
@_trait_option
@examples_as_option
@root_option
@one_line_errors
def check(chosen: tuple[Trait, ...], examples_as: str, root: Path) -> None:
    """Check contrastive examples: counts, duplicates, lengths, and whether words alone reveal the side."""
    from tlcapture.extraction.example_checks import check_examples
    from tlcapture.extraction.examples import GUESS, read_examples
    from tlcapture.storage.layout import Datasets

    datasets = Datasets(root)
    examples = [read_examples(datasets, trait, examples_as=examples_as) for trait in chosen or datasets.traits()]
    if any(each.is_guess for each in examples):
        Console().warn(GUESS)
    found = [check_examples(each) for each in examples]
    names = ("positive", "negative", "pairs", "duplicates", "length ratio", "by prompt", "by response", "leaking")
    echo_table([Column("trait"), *(Column(name, right=True) for name in names)], map(_counts, found))
    for each in found:
        for concern in each.concerns:
            click.secho(printable(f"{each.trait}: {concern}"), fg="yellow")
        if each.leaking_pairs:
            click.echo(printable(f"{each.trait}: pairs whose prompts leak: {', '.join(each.leaking_pairs)}"))


def _counts(found: Check) -> tuple[str, ...]:
    return (
        str(found.trait),
        str(found.n_positive),
        str(found.n_negative),
        str(found.n_pairs),
        str(found.duplicates),
        f"{found.length_ratio:.2f}",
        "-" if found.prompt_accuracy is None else f"{found.prompt_accuracy:.0%}",
        f"{found.response_accuracy:.0%}",
        str(len(found.leaking_pairs)),
    )


@traits.command("list", context_settings=HELP_NAMES)
@location_options
@click.option("--component", type=click.Choice(["residual", "attn_out"]), default="residual", show_default=True)
@one_line_errors
def list_(location: Location, component: str) -> None:
    """List the vector selected for each trait: how it was selected, its score, the runner-up and its origin."""
    from tlcapture.traits.origin import described_origin
    from tlcapture.traits.selection import n_layers_of_origin, runner_up, select
    from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors

    layout = location.layout
    layout.check_exists()
    with_vectors = traits_with_vectors(layout)
    rows: list[tuple[str, ...]] = []
    origins: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for trait in with_vectors:
        folder = VectorFiles(layout, trait)
        if not folder.available(component):
            rows.append((str(trait), "-", "-", f"no {component} vectors", "-", "-"))
            continue
        found = select(folder, component, n_layers_of_origin(folder, component))
        origins.setdefault(described_origin(folder.metadata(component, found.method)), []).append(str(trait))
        if found.warning is not None:
            notes.setdefault(found.warning, []).append(str(trait))
        score = "-" if found.score is None else f"{found.score:.3f}"
        rival = runner_up(folder, component, found)
        second = "-" if rival is None else f"{rival.method} at layer {rival.layer}, {rival.score:.3f}"
        rows.append((str(trait), found.method, str(found.layer), found.selected_by, score, second))
    columns = [
        Column("trait"),
        Column("method"),
        Column("layer", right=True),
        Column("selected by"),
        Column("score", right=True),
        Column("runner-up"),
    ]
    echo_table(columns, rows)
    for note, names in notes.items():
        click.secho(printable(f"{', '.join(names)}: {note}"), fg="yellow")
    for origin, names in origins.items():
        click.echo(printable(f"{'all' if len(origins) == 1 else ', '.join(names)}: {origin}"))


@traits.command("import", context_settings=HELP_NAMES)
@click.argument("file", type=click.Path(path_type=Path))
@location_options
@click.option("--trait", type=OneTrait(), required=True, help="Trait that the vectors are of; it may be a new one.")
@click.option(
    "--convention",
    type=click.Choice(["hidden_states", "resid_post", "resid_pre"]),
    help="How the file counts layers: Hugging Face's hidden states, whose 0 is the embedding; outputs of blocks; "
    "inputs of blocks.  [default: what the file says]",
)
@click.option(
    "--component",
    type=click.Choice(["residual", "attn_out"]),
    help="Which activation the vectors are for.  [default: what the file says, or residual]",
)
@click.option("--model", metavar="NAME", help="Model that the vectors are of.  [default: the experiment's]")
@click.option(
    "--allow-model-change", is_flag=True, help="Continue even if the experiment has used another model so far."
)
@click.option("--overwrite", is_flag=True, help="Replace vectors that were imported before.")
@working
def import_(
    console: Console, location: Location, file: Path, trait: Trait, convention: str | None, component: str | None,
    model: str | None, allow_model_change: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Import vectors that another tool made, from FILE, as vectors of a trait.

    FILE is persona-vectors' .pt, a GGUF control vector (repeng), a SteeringVector saved with torch.save
    (steering-vectors), or a .pt or .safetensors file with one vector per layer. Their method is called "imported".
    """
    from tlcapture.commands.import_vectors import ImportOptions, run_import

    options = ImportOptions(file, trait, convention, component, model, overwrite, allow_model_change)
    run_import(location.layout, options, console)
