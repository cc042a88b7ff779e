"""`tlcapture traits`: check contrastive examples, list the selected vectors, and import those of other tools."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import Group
from tlcapture.cli.options.grouping import options_of
from tlcapture.cli.options.shared import DEFAULT_EXPERIMENT, Location, examples_as_option, root_option
from tlcapture.cli.options.types import LocalPath, OneTrait, Traits
from tlcapture.cli.output.console import Console, one_line_errors
from tlcapture.cli.output.tables import Column, echo_table
from tlcapture.cli.work import working
from tlcapture.errors import InputError, TlcaptureError
from tlcapture.names import Trait
from tlcapture.text import printable
from tlcapture.views.hooks import COMPONENTS

if TYPE_CHECKING:
    from tlcapture.extraction.example_checks import Cue, ExampleCheck
    from tlcapture.extraction.examples import Examples
    from tlcapture.storage.experiments.datasets import Datasets
    from tlcapture.storage.experiments.layout import Layout

_MOST_SIZES = 3  # shown of the numbers of examples that traits have


@click.group(cls=Group)
def traits() -> None:
    """Check the contrastive examples of traits, list the selected vectors, and import those of other tools."""


@traits.command(
    examples=["tlcapture traits check", "tlcapture traits check --traits style/formality"],
    short_help="Check contrastive examples.",
)
@click.option("--traits", type=Traits(), default="all", show_default=True, help="Traits to check.")
@examples_as_option
@root_option
@one_line_errors
def check(traits: tuple[Trait, ...], examples_as: str, root: Path) -> None:
    """Check contrastive examples: duplicates, lengths, and words that reveal the side.

    The exit status is 1 if a check fails: docs/traits.md says why each of them matters.
    """
    from tlcapture.storage.experiments.datasets import Datasets

    datasets = Datasets(root)
    for trait in traits:
        datasets.trait_folder(trait)
    from tlcapture.extraction.example_checks import check_examples
    from tlcapture.extraction.examples import GUESS, read_examples

    examples = [read_examples(datasets, trait, examples_as=examples_as) for trait in traits or datasets.traits()]
    if any(each.is_guess for each in examples):
        Console().warn(GUESS)
    others = _readable(datasets, [trait for trait in datasets.traits() if traits and trait not in traits])
    found = check_examples(examples, others)
    _echo_checks(found)
    concerns = [f"{each.trait}: {concern}" for each in found for concern in each.concerns]
    for concern in concerns:
        click.secho(printable(concern), fg="yellow")
    if concerns:
        sys.exit(1)
    named = ["--traits", ",".join(map(str, traits))] if traits else []
    click.echo(f"next: {Location(DEFAULT_EXPERIMENT, root).command('extract', *named)}")


def _readable(datasets: Datasets, unchosen: Sequence[Trait]) -> list[Examples]:
    """The examples of the traits that are not checked themselves; those that cannot be read are named."""
    from tlcapture.extraction.examples import read_examples

    found = []
    for trait in unchosen:
        try:
            found.append(read_examples(datasets, trait))
        except TlcaptureError as error:
            click.secho(printable(f"not compared with {trait}: {error}"), fg="yellow", err=True)
    return found


def _echo_checks(found: Sequence[ExampleCheck]) -> None:
    from tlcapture.extraction.example_checks import BOUNDS, OTHER_WORDS_BOUNDS
    from tlcapture.extraction.surface_cues import chance_interval, embedded_tokenizer

    names = list(dict.fromkeys(name for each in found for name in each.cues))
    columns = [Column("trait"), *(Column(name, right=True) for name in ("pairs", "twice", *names))]
    rows = [_cells(each, names) for each in found]
    fails = any(cell.endswith("*") for row in rows for cell in row)
    echo_table(columns, [row if fails else tuple(map(str.rstrip, row)) for row in rows])
    sizes = sorted({(each.n_positive, each.n_negative) for each in found})[:_MOST_SIZES]
    chance = ", ".join("{:.2f} to {:.2f} for {} and {}".format(*chance_interval(*size), *size) for size in sizes)
    click.echo(
        "AUROC of positive against negative examples: 0.5 is uninformative." + (" * fails, see below." if fails else "")
    )
    click.echo(f"95 % of the time by chance: {chance} examples.")
    click.echo("Bounds: {:.2f} to {:.2f} for lengths, over all and within pairs, and by prompt;".format(*BOUNDS))
    click.echo("        {:.2f} to {:.2f} for the words of other traits; no example twice.".format(*OTHER_WORDS_BOUNDS))
    click.echo("Only reported: by response, and in style/ characters a word, since both are part of the trait.")
    if not embedded_tokenizer():
        click.echo("Tokens are counted as words and marks: the embedded model's tokenizer has not been converted yet.")


def _cells(found: ExampleCheck, names: Sequence[str]) -> tuple[str, ...]:
    """The cells of a row. What fails ends in an asterisk, other numbers in a space, so that digits are in line."""
    counts = (f"{found.n_pairs}", f"{found.duplicates}{'*' if found.duplicates else ' '}")
    return (str(found.trait), *counts, *(_cell(found.cues.get(name)) for name in names))


def _cell(cue: Cue | None) -> str:
    if cue is None or cue.auroc is None:
        return "- "
    return f"{cue.auroc:.2f}{'*' if cue.leaks else ' '}"


@traits.command(
    "list",
    examples=["tlcapture traits list --experiment my_exp"],
    short_help="List the vector of each trait, and why.",
)
@options_of(Location, "location")
@click.option(
    "--component",
    type=click.Choice(COMPONENTS),
    default="residual",
    show_default=True,
    help="Which activations the vectors are for.",
)
@one_line_errors
def list_(location: Location, component: str) -> None:
    """List the vector selected for each trait: how it was selected, its score, runner-up, verdict and origin.

    Names the traits whose examples have changed since their vectors were extracted.
    """
    from tlcapture.storage.experiments.config import read_config
    from tlcapture.storage.experiments.datasets import Datasets
    from tlcapture.traits.vector_sources.packaged import packaged_layout, takes_packaged, vectors_layout

    layout = vectors_layout(location.root, location.experiment)
    layout.check_exists()
    if takes_packaged(layout, read_config(layout).inference_model):
        click.echo(f"{layout.experiment} has no vectors of its own: these come with the package")
        layout = packaged_layout()
    columns = [
        Column("trait"),
        Column("method"),
        Column("layer", right=True),
        Column("selected by"),
        Column("score", right=True),
        Column("runner-up"),
    ]
    listed = _listed(layout, component, Datasets(location.root))
    echo_table(columns, listed.rows)
    for note, names in listed.notes.items():
        click.secho(printable(f"{', '.join(names)}: {note}"), fg="yellow")
    for verdict, names in listed.verdicts.items():
        click.echo(printable(f"{', '.join(names)}: {verdict}"))
    for origin, names in listed.origins.items():
        click.echo(printable(f"{'all' if len(listed.origins) == 1 else ', '.join(names)}: {origin}"))
    options = ["--all-prompt-sets"] if location.layout.captured_prompt_sets() else ["--prompt-set", "single_trait"]
    click.echo(f"next: {location.command('capture' if len(options) == 2 else 'project', *options)}")


@dataclass(frozen=True)
class _Listed:
    """Rows of the table, and below it the traits that each note, verdict or origin applies to."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    verdicts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    origins: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def _listed(layout: Layout, component: str, datasets: Datasets) -> _Listed:
    from tlcapture.extraction.changed_examples import have_changed
    from tlcapture.traits.evaluation_files import Evaluation
    from tlcapture.traits.missing_vectors import how_to_extract
    from tlcapture.traits.origin import described_origin
    from tlcapture.traits.selection import n_layers_of_origin, runner_up, select
    from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors

    with_vectors, evaluated = traits_with_vectors(layout), Evaluation.read(layout.evaluation).by_trait
    listed = _Listed()
    changed: list[str] = []
    for trait in with_vectors:
        folder = VectorFiles(layout, trait)
        if not folder.available(component):
            listed.rows.append((str(trait), "-", "-", f"no {component} vectors", "-", "-"))
            continue
        found = select(folder, component, n_layers_of_origin(folder, component))
        metadata = folder.metadata(component, found.method)
        listed.origins[described_origin(metadata)].append(str(trait))
        if have_changed(datasets, trait, metadata):
            changed.append(str(trait))
        if found.warning is not None:
            listed.notes[found.warning].append(str(trait))
        judged = evaluated.get(str(trait))
        is_judged = judged and (judged.component, judged.method, judged.layer) == (component, found.method, found.layer)
        if judged and judged.verdict and is_judged and found.selected_by == "effect_size":  # its scores are current
            listed.verdicts[judged.verdict].append(str(trait))
        score = "-" if found.score is None else f"{found.score:.3f}"
        rival = runner_up(folder, component, found)
        second = "-" if rival is None else f"{rival.method} at layer {rival.layer}, {rival.score:.3f}"
        listed.rows.append((str(trait), found.method, str(found.layer), found.selected_by, score, second))
    if changed:
        note = f"the examples have changed since the vectors were extracted: {how_to_extract(layout, changed)}"
        listed.notes[note] = changed
    return listed


@traits.command(
    "import",
    examples=[
        "tlcapture traits import shared/my_exp/vectors/behavioral/refusal.mean_diff.gguf --experiment copy "
        "--trait behavioral/refusal"
    ],
    short_help="Import vectors of another tool.",
)
@click.argument("file", type=LocalPath())
@options_of(Location, "location")
@click.option("--trait", type=OneTrait(), required=True, help="Trait to import the vectors for; it may be a new one.")
@click.option(
    "--convention",
    type=click.Choice(["hidden_states", "resid_post", "resid_pre"]),
    help="How the file counts layers: Hugging Face's hidden states, whose 0 is the embedding; outputs of blocks; "
    "inputs of blocks.  [default: what the file says]",
)
@click.option(
    "--component",
    type=click.Choice(COMPONENTS),
    help="Which activation the vectors are for.  [default: what the file says, or residual]",
)
@click.option("--model", metavar="NAME", help="Model that the vectors come from.  [default: the experiment's]")
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
    (steering-vectors), or a .pt, .safetensors, .npz or .npy file with one vector per layer. Their method is called
    "imported".
    """
    from tlcapture.models.checkpoints.sources import check_name

    if not lexists(file):
        raise InputError(f"{file}: no such file")
    if model is not None:
        check_name(model)
    from tlcapture.commands.import_vectors import ImportOptions, run_import

    options = ImportOptions(file, trait, convention, component, model, overwrite, allow_model_change)
    of = run_import(location.layout, options, console)
    named = ["--traits", str(trait), *([] if of == "residual" else ["--component", of])]
    console.next = location.command("project", "--all-prompt-sets", *named)
