"""`tlcapture traits`: the examples of traits, and which vector of each is chosen."""

from __future__ import annotations

from pathlib import Path

import click

from tlcapture.cli.console import one_line_errors
from tlcapture.cli.options import Traits, experiment_option, root_option
from tlcapture.names import Trait
from tlcapture.text import printable

_HELP = {"help_option_names": ["-h", "--help"]}
_trait_option = click.option(
    "--traits", "chosen", type=Traits(), default="all", show_default=True, help="Which traits."
)


@click.group(context_settings=_HELP)
def traits() -> None:
    """Look at traits: their examples, and which vector is chosen."""


@traits.command(context_settings=_HELP)
@_trait_option
@root_option
@one_line_errors
def check(chosen: tuple[Trait, ...], root: Path) -> None:
    """Check contrastive examples: counts, duplicates, length, and whether words alone give the side away."""
    from tlcapture.extraction.checks import check_examples
    from tlcapture.extraction.examples import read_examples
    from tlcapture.storage.layout import Datasets

    datasets = Datasets(root)
    click.echo(
        f"{'trait':<26}{'positive':>9}{'negative':>9}{'pairs':>7}{'twice':>7}{'length':>8}"
        f"{'by prompt':>11}{'by response':>13}{'leaking':>9}"
    )
    for trait in chosen or datasets.traits():
        found = check_examples(read_examples(datasets, trait))
        by_prompt = "-" if found.prompt_accuracy is None else f"{found.prompt_accuracy:.0%}"
        click.echo(
            f"{found.trait:<26}{found.n_positive:>9}{found.n_negative:>9}{found.n_pairs:>7}{found.duplicates:>7}"
            f"{found.length_ratio:>8.2f}{by_prompt:>11}{found.response_accuracy:>13.0%}{len(found.leaking_pairs):>9}"
        )
        for concern in found.concerns:
            click.secho(f"  {concern}", fg="yellow")
        if found.leaking_pairs:
            click.echo(printable(f"  pairs whose prompts leak: {', '.join(found.leaking_pairs)}"))


@traits.command("list", context_settings=_HELP)
@experiment_option
@click.option("--component", type=click.Choice(["residual", "attn_out"]), default="residual", show_default=True)
@root_option
@one_line_errors
def list_(experiment: str, component: str, root: Path) -> None:
    """Show which vector of each trait is chosen, by what, with its score, the runner-up and its origin."""
    from tlcapture.storage.layout import Layout
    from tlcapture.traits.origin import described_origin
    from tlcapture.traits.selection import n_layers_of_origin, runner_up, select
    from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors

    layout = Layout(root, experiment)
    layout.check_exists()
    with_vectors = traits_with_vectors(layout)
    click.echo(f"{'trait':<26}{'method':<11}{'layer':>5}  {'by':<12}{'score':>9}   runner-up")
    origins: dict[str, list[str]] = {}
    for trait in with_vectors:
        folder = VectorFiles(layout, trait)
        if not folder.available(component):
            click.echo(f"{trait!s:<26}no {component} vectors")
            continue
        origins.setdefault(described_origin(folder.metadata(component)), []).append(str(trait))
        found = select(folder, component, n_layers_of_origin(folder, component))
        score = "-" if found.score is None else f"{found.score:.3f}"
        rival = runner_up(folder, component, found)
        second = "-" if rival is None else f"{rival.method} at layer {rival.layer}, {rival.score:.3f}"
        click.echo(f"{trait!s:<26}{found.method:<11}{found.layer:>5}  {found.selected_by:<12}{score:>9}   {second}")
    for origin, names in origins.items():
        click.echo(f"{'all' if len(origins) == 1 else ', '.join(names)}: {origin}")
