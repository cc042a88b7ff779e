"""`tlcapture capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tlcapture.cli.cluster import cluster_options, take_executor
from tlcapture.cli.console import Console, show_top_traits
from tlcapture.cli.options import (
    LayerOrWord,
    batch_size_option,
    experiment_option,
    kept_options,
    model_options,
    prompt_set_options,
    root_option,
    save_dtype_option,
    seed_option,
    shard_option,
    vector_options,
)
from tlcapture.cli.work import working


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@experiment_option
@prompt_set_options
@click.option("--prompt", metavar="TEXT", help="A single prompt: prompt 1 of the prompt set adhoc.")
@click.option("--attention", is_flag=True, help="Attention patterns of all layers and heads, as JSON.")
@click.option("--logit-lens", is_flag=True, help="Top predictions of every layer, as JSON.")
@click.option(
    "--layer-internals",
    type=LayerOrWord("all"),
    multiple=True,
    help="Everything a layer computes; repeatable. all: every layer, and --attention --logit-lens.",
)
@click.option("--capture-attn", is_flag=True, help="Keep attention outputs beside the residual stream.")
@kept_options
@click.option("--no-project", is_flag=True, help="Do not project onto the experiment's trait vectors.")
@click.option("--projections-only", is_flag=True, help="Keep projections alone, and no raw activations.")
@click.option("--replay", is_flag=True, help="Generate nothing: make add-ons from saved captures.")
@click.option(
    "--layer",
    type=LayerOrWord("auto"),
    default="16",
    show_default=True,
    help="Layer of the vectors to project onto; auto: by steering or effect size, per trait.",
)
@vector_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(0, 2**31 - 1),
    metavar="N",
    default=50,
    show_default=True,
    help="Longest response.",
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="Of sampling; 0 is greedy."
)
@click.option("--skip-existing", is_flag=True, help="Make only what is missing.")
@click.option("--dry-run", is_flag=True, help="Only say how many prompts, files and bytes it would be.")
@click.option("--limit", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Only the first prompts of each set.")
@shard_option
@save_dtype_option
@click.option(
    "--chat-template/--no-chat-template",
    default=None,
    help="Put prompts through it or not.  [default: where there is one]",
)
@click.option("--system-prompt", metavar="TEXT", help="For all prompts, in place of their own.")
@model_options
@cluster_options
@batch_size_option
@seed_option
@root_option
@working
def capture(
    console: Console,
    experiment: str,
    root: Path,
    prompt_set: tuple[str, ...] | None,
    prompt: str | None,
    all_prompt_sets: bool,
    layer: int | str,
    layer_internals: tuple[int | str, ...],
    **options: Any,
) -> None:
    """Generate from prompts and capture what the model does inside, token by token.

    Writes raw residuals to experiments/NAME/inference/raw/residual, add-ons beside them, and projections
    onto the experiment's trait vectors where it has any.
    """
    from tlcapture.prompts.prompt_sets import adhoc, read_prompt_set
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.layout import Datasets, Layout

    if sum([prompt_set is not None, prompt is not None, all_prompt_sets]) != 1:
        raise click.UsageError("give one of --prompt-set NAME, --prompt TEXT and --all-prompt-sets")
    layout, datasets = Layout(root, experiment), Datasets(root)
    if prompt is not None:
        sets = [adhoc(prompt)]
    else:
        sets = [read_prompt_set(datasets, name) for name in prompt_set or datasets.prompt_sets()]
    model_names = ("model", "allow_model_change", "engine", "device", "n_devices", "dtype")
    load = ModelLoader.settle(layout, "inference_model", console, **{name: options.pop(name) for name in model_names})
    is_default = click.get_current_context().get_parameter_source("layer") is click.core.ParameterSource.DEFAULT
    _run(layout, sets, load, console, "default" if is_default else layer, layer_internals, **options)


def _run(
    layout: Any,
    sets: Any,
    load: Any,
    console: Console,
    layer: int | str,
    layer_internals: tuple[int | str, ...],
    *,
    no_project: bool,
    method: str | None,
    vector_experiment: str | None,
    temperature: float,
    seed: int,
    dry_run: bool,
    **options: Any,
) -> None:
    executor = take_executor(options, options["batch_size"], collects=not options["projections_only"])
    from tlcapture.commands.capture import CaptureOptions, estimate_capture, run_capture
    from tlcapture.generation.loop import Sampling
    from tlcapture.storage.files import free_bytes
    from tlcapture.traits.choice import VectorChoice

    chosen = CaptureOptions(
        internals="all" if "all" in layer_internals else tuple(int(n) for n in layer_internals),
        project=not no_project,
        vectors=VectorChoice(layer=layer, method=method, experiment=vector_experiment),
        sampling=Sampling(temperature, seed),
        **options,
    )
    if dry_run:
        estimate, free = estimate_capture(layout, sets, chosen, load), free_bytes(layout.folder)
        console.uses(estimate={**estimate.to_json(), "free": free})
        for line in estimate.lines(free):
            console.line(line)
        return
    report = run_capture(layout, sets, chosen, load, console, executor)
    # What an earlier run left would look like this one's, had this one written nothing.
    if not no_project and (report.n_files or not report.failures):
        for prompt_set in sets:
            show_top_traits(console, layout, prompt_set.name)
