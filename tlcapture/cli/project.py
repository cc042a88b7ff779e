"""`tlcapture project`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.cluster import ClusterOptions
from tlcapture.cli.options.grouping import option, options_of, shared
from tlcapture.cli.options.shared import (
    Location,
    PromptSetOptions,
    VectorOptions,
    format_option,
    shard_option,
)
from tlcapture.cli.options.types import LocalPath, Traits
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.top_traits import show_top_traits
from tlcapture.cli.work import working
from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.text import counted
from tlcapture.views.hooks import COMPONENTS

if TYPE_CHECKING:
    from tlcapture.commands.project import ProjectOptions
    from tlcapture.runs.prompt_shares import PromptShare
    from tlcapture.storage.experiments.layout import Layout


@dataclass(frozen=True)
class _Settings:
    """What to project and how, with the choice of vectors."""

    traits: tuple[Trait, ...] = option(
        "--traits", type=Traits(), default="all", show_default=True, help="Traits to project onto."
    )
    vectors: VectorOptions = shared(VectorOptions)
    component: str = option(
        "--component",
        type=click.Choice(COMPONENTS),
        default="residual",
        show_default=True,
        help="Which activations are projected: the residual stream, or outputs of attention.",
    )
    dynamics_only: bool = option(
        "--dynamics-only",
        is_flag=True,
        help="Only recompute the dynamics (velocity, commitment, persistence) of existing projections.",
    )
    centered: bool = option(
        "--centered", is_flag=True, help="Subtract the mean activation of the training examples first."
    )
    skip_existing: bool = option("--skip-existing", is_flag=True, help="Write only missing files.")
    overwrite: bool = option("--overwrite", is_flag=True, help="Also replace projections that cannot be read.")
    shard: PromptShare | None = shared(shard_option)
    format: str | None = shared(format_option)
    plot: Path | None = option(
        "--plot",
        type=LocalPath(file_okay=False),
        metavar="DIR",
        help="Also draw the trajectory and layers of each prompt and trait, as PNG files in DIR.",
    )

    def project_options(self) -> ProjectOptions:
        """What to project, and onto which vectors."""
        from tlcapture.commands.project import ProjectOptions

        return ProjectOptions(
            vectors=self.vectors.choice("auto", self.traits),
            component=self.component,
            dynamics_only=self.dynamics_only,
            centered=self.centered,
            skip_existing=self.skip_existing,
            overwrite=self.overwrite,
            shard=self.shard,
            form=self.format,
        )


@command(
    "tlcapture project --experiment my_exp --prompt-set single_trait",
    "tlcapture project --experiment my_exp --all-prompt-sets --traits style/formality --layer 12",
)
@options_of(Location, "location")
@options_of(PromptSetOptions, "prompt_sets")
@options_of(_Settings, "settings")
@options_of(ClusterOptions, "cluster")
@working
def project(
    console: Console,
    location: Location,
    prompt_sets: PromptSetOptions,
    settings: _Settings,
    cluster: ClusterOptions,
) -> None:
    """Project saved captures onto trait vectors.

    Writes a score for each token, layer and point to experiments/NAME/inference/TRAIT, and the dynamics of the trait:
    its velocity, and when it commits and how long it persists, each beside chance.
    """
    layout = location.layout
    names = _captured_prompt_sets(layout, prompt_sets, dynamics_only=settings.dynamics_only)
    _check_request(location, names, settings)
    from tlcapture.commands.project import run_project

    executor = cluster.make_executor()
    report = run_project(layout, names, settings.project_options(), console, executor)
    for name in names:
        # Projections of an earlier run would look like this run's, had this one written nothing.
        if report.n_files or not report.failures:
            show_top_traits(console, layout, name, settings.component, report)
        if settings.plot is not None:
            # A picture that cannot be drawn must not fail the projections.
            from tlcapture.commands.pictures import write_pictures

            with report.attempt(f"pictures of {name}"):
                ids = layout.prompt_ids(name)
                drawn = write_pictures(layout, name, ids, settings.plot, settings.component, settings.traits, console)
                console.line(f"{name}: {counted(len(drawn), 'picture')} in {settings.plot}")
    if report.n_files or not report.failures:
        console.next = location.command("view")


def _check_request(location: Location, names: tuple[str, ...], settings: _Settings) -> None:
    """Raise `InputError` if captures or vectors are missing."""
    from tlcapture.commands.projecting.saved_prompts import saved_prompts
    from tlcapture.storage.experiments.config import read_config
    from tlcapture.traits.missing_vectors import PACKAGED
    from tlcapture.traits.vector_files import traits_with_vectors
    from tlcapture.traits.vector_sources.packaged import takes_packaged, vectors_layout

    layout = location.layout
    for name in names:
        saved_prompts(layout, name, dynamics_only=settings.dynamics_only)
    if not settings.dynamics_only:
        vector_experiment = settings.vectors.vector_experiment
        is_packaged = vector_experiment is None and takes_packaged(layout, read_config(layout).inference_model)
        source = vectors_layout(location.root, PACKAGED if is_packaged else vector_experiment or location.experiment)
        source.check_exists()
        traits_with_vectors(source, settings.traits)


def _captured_prompt_sets(layout: Layout, chosen: PromptSetOptions, *, dynamics_only: bool) -> tuple[str, ...]:
    from tlcapture.storage.experiments.command_lines import command_line

    if (chosen.prompt_set is not None) == chosen.all_prompt_sets:
        raise click.UsageError("give one of --prompt-set NAME and --all-prompt-sets")
    layout.check_exists()
    captured = layout.prompt_sets if dynamics_only else layout.captured_prompt_sets
    names = chosen.prompt_set or tuple(captured())
    if not names:
        command = command_line(layout, "capture", "--prompt-set", "NAME")
        raise InputError(f"experiment {layout.experiment!r} has no captures: run '{command}' first")
    return names
