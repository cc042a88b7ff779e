"""`tlcapture project`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.cluster import cluster_options, take_executor
from tlcapture.cli.console import Console, show_top_traits
from tlcapture.cli.options import (
    LayerOrWord,
    Traits,
    experiment_option,
    prompt_set_options,
    root_option,
    shard_option,
    vector_options,
)
from tlcapture.cli.work import working
from tlcapture.names import Trait

if TYPE_CHECKING:
    from tlcapture.runs.report import RunReport
    from tlcapture.runs.shards import Shard
    from tlcapture.storage.layout import Layout


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@experiment_option
@prompt_set_options
@click.option("--traits", type=Traits(), default="all", show_default=True, help="Traits to project onto.")
@click.option(
    "--layer",
    type=LayerOrWord("auto"),
    default="auto",
    show_default=True,
    help="Layer of the vectors; auto: by steering or effect size, per trait.",
)
@vector_options
@click.option(
    "--component",
    type=click.Choice(["residual", "attn_out"]),
    default="residual",
    show_default=True,
    help="Which activation is projected.",
)
@click.option("--dynamics-only", is_flag=True, help="Compute the dynamics of existing projections again, nothing else.")
@click.option("--skip-existing", is_flag=True, help="Make only what is missing.")
@shard_option
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write trajectory and layers of each prompt and trait as PNG, below DIR.",
)
@cluster_options
@root_option
@working
def project(
    console: Console,
    experiment: str,
    root: Path,
    prompt_set: tuple[str, ...] | None,
    all_prompt_sets: bool,
    traits: tuple[Trait, ...],
    layer: int | str,
    method: str | None,
    vector_experiment: str | None,
    component: str,
    dynamics_only: bool,
    skip_existing: bool,
    shard: Shard | None,
    plot: Path | None,
    **cluster: Any,
) -> None:
    """Project saved captures onto trait vectors."""
    from tlcapture.commands.project import ProjectOptions, run_project
    from tlcapture.errors import InputError
    from tlcapture.storage.layout import Layout
    from tlcapture.traits.choice import VectorChoice

    if (prompt_set is not None) == all_prompt_sets:
        raise click.UsageError("give one of --prompt-set NAME and --all-prompt-sets")
    layout, executor = Layout(root, experiment), take_executor(cluster)
    names = prompt_set or (layout.prompt_sets() if dynamics_only else layout.captured_prompt_sets())
    if not names:
        raise InputError(f"experiment {experiment!r} has no captures: run 'tlcapture capture' first")
    report = run_project(
        layout,
        names,
        ProjectOptions(
            vectors=VectorChoice(layer, method, vector_experiment, traits),
            component=component,
            dynamics_only=dynamics_only,
            skip_existing=skip_existing,
            shard=shard,
        ),
        console,
        executor,
    )
    for name in names:
        # What an earlier run left would look like this one's, had this one written nothing.
        if report.n_files or not report.failures:
            show_top_traits(console, layout, name, component)
        if plot is not None:
            _draw(layout, name, plot, component, traits, report, console)


def _draw(
    layout: Layout,
    prompt_set: str,
    folder: Path,
    component: str,
    traits: tuple[Trait, ...],
    report: RunReport,
    console: Console,
) -> None:
    """Write the pictures of a prompt set; what goes wrong fails the pictures, not the projections."""
    from tlcapture.commands.pictures import write_pictures

    with report.attempt(f"pictures of {prompt_set}"):
        ids = layout.prompt_ids(prompt_set)
        pictures = write_pictures(layout, prompt_set, ids, folder, component, traits, console)
        console.line(f"{prompt_set}: {len(pictures)} pictures in {folder}")
