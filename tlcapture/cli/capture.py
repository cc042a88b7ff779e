"""`tlcapture capture`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.cluster import ClusterOptions
from tlcapture.cli.options.given_prompts import GivenPrompts
from tlcapture.cli.options.grouping import option, options_of, shared
from tlcapture.cli.options.interventions import InOrder, InterventionOptions
from tlcapture.cli.options.model import ModelOptions
from tlcapture.cli.options.sampling import SamplingOptions
from tlcapture.cli.options.shared import (
    KeptOptions,
    Location,
    PromptSetOptions,
    VectorOptions,
    batch_size_option,
    layer_option,
    save_dtype_option,
    seed_option,
    shard_option,
)
from tlcapture.cli.options.types import Count, LayerOrWord, TemplateArg, Text
from tlcapture.cli.options.variants import VariantOptions, check_target, without_effect_on_replay
from tlcapture.cli.output.console import Console
from tlcapture.cli.output.tables import Column
from tlcapture.cli.output.top_traits import show_top_traits
from tlcapture.cli.work import working
from tlcapture.names import base_set, variant_of
from tlcapture.prompts.response_lengths import NEW_TOKENS, THINKING_TOKENS
from tlcapture.text import counted, format_bytes

if TYPE_CHECKING:
    from tlcapture.commands.capturing.given_responses import GivenResponses
    from tlcapture.commands.capturing.options import CaptureOptions
    from tlcapture.prompts.prompt_sets import PromptSet
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.runs.prompt_shares import PromptShare
    from tlcapture.storage.experiments.layout import Layout

_MOST_PATHS = 20  # that a dry run lists


@dataclass(frozen=True)
class _Settings:
    """What to capture and how: the options of `capture` alone, and the groups that it shares with other commands."""

    prompts: GivenPrompts = shared(GivenPrompts)
    attention: bool = option(
        "--attention", is_flag=True, help="Also write attention patterns, of all layers and heads."
    )
    logit_lens: bool = option(
        "--logit-lens", is_flag=True, help="Also write the most likely next tokens of each layer."
    )
    layer_internals: tuple[int | str, ...] = option(
        "--layer-internals",
        type=LayerOrWord("all"),
        multiple=True,
        help="Also write all activations within layer N; repeatable. all: of every layer, with --attention and "
        "--logit-lens.",
    )
    capture_attn: bool = option(
        "--capture-attn", is_flag=True, help="Also keep the outputs of attention, beside the residual stream."
    )
    kept: KeptOptions = shared(KeptOptions)
    no_project: bool = option("--no-project", is_flag=True, help="Do not project onto trait vectors.")
    projections_only: bool = option(
        "--projections-only", is_flag=True, help="Keep only projections, no raw activations."
    )
    replay: bool = option(
        "--replay", is_flag=True, help="Generate nothing; add attention, logit lens or internals to saved captures."
    )
    vectors: VectorOptions = shared(
        options_of(VectorOptions, "vectors", layer=layer_option("auto, or 16 where nothing was evaluated"))
    )
    interventions: InterventionOptions = shared(InterventionOptions)
    variants: VariantOptions = shared(VariantOptions)
    max_new_tokens: int | None = option(
        "--max-new-tokens",
        type=Count(0),
        help=f"Maximum length of a response.  [default: {NEW_TOKENS}, or {THINKING_TOKENS} where the chat template "
        "makes models think]",
    )
    sampling: SamplingOptions = shared(SamplingOptions)
    skip_existing: bool = option("--skip-existing", is_flag=True, help="Write only missing files.")
    overwrite: bool = option(
        "--overwrite", is_flag=True, help="Also replace files that cannot be read, and those derived from them."
    )
    dry_run: bool = option(
        "--dry-run", is_flag=True, help="Only report how many prompts, files and bytes would be written."
    )
    limit: int | None = option("--limit", type=Count(), help="Only the first N prompts of each set.")
    shard: PromptShare | None = shared(shard_option)
    save_dtype: str = shared(save_dtype_option)
    chat_template: bool | None = option(
        "--chat-template/--no-chat-template",
        default=None,
        help="Whether to apply the chat template.  [default: apply it if the model has one]",
    )
    system_prompt: str | None = option(
        "--system-prompt", type=Text(), metavar="TEXT", help="System prompt for all prompts, instead of their own."
    )
    thinking: str | None = option(
        "--thinking",
        type=click.Choice(["on", "off"]),
        help="Turn thinking on or off, if the chat template has a switch for it.  [default: the template's]",
    )
    template_arg: tuple[tuple[str, Any], ...] = option(
        "--template-arg",
        type=TemplateArg(),
        multiple=True,
        help="A variable for the chat template, as JSON or text; repeatable.",
    )
    batch_size: int | None = shared(batch_size_option)
    seed: int = shared(seed_option)

    def capture_options(self, responses_from: GivenResponses | None) -> CaptureOptions:
        """The options of the command, with the captures whose tokens are run, if any."""
        from tlcapture.commands.capturing.options import ALL_LAYERS, CaptureOptions

        layers = tuple(layer for layer in self.layer_internals if isinstance(layer, int))
        return CaptureOptions(
            attention=self.attention,
            logit_lens=self.logit_lens,
            internals=ALL_LAYERS if ALL_LAYERS in self.layer_internals else layers,
            capture_attn=self.capture_attn,
            layers=self.kept.layers,
            points=self.kept.points,
            tokens=self.kept.tokens,
            parts=self.kept.parts,
            project=not self.no_project,
            projections_only=self.projections_only,
            replay=self.replay,
            skip_existing=self.skip_existing,
            overwrite=self.overwrite,
            vectors=self.vectors.choice("auto"),
            max_new_tokens=NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens,
            longer_where_thinking=self.max_new_tokens is None,
            sampling=self.sampling.asked(self.seed),
            samples=self.sampling.samples,
            save_dtype=self.save_dtype,
            batch_size=self.batch_size,
            limit=self.limit,
            shard=self.shard,
            chat_template=self.chat_template,
            system_prompt=self.system_prompt,
            thinking=self.thinking,
            template_args=dict(self.template_arg),
            interventions=self.interventions.in_order(),
            variant=self.interventions.variant,
            adapter=self.variants.adapter_path,
            responses_from=responses_from,
        )


@command(
    'tlcapture capture --prompt "How do tides work?"',
    "tlcapture capture --experiment my_exp --prompt-set single_trait --attention --logit-lens",
    "tlcapture capture --experiment my_exp --prompt-set single_trait --steer behavioral/refusal:+0.2@16 --variant "
    "refusing",
    cls=InOrder,
)
@options_of(Location, "location")
@options_of(PromptSetOptions, "prompt_sets")
@options_of(ModelOptions, "model")
@options_of(ClusterOptions, "cluster")
@options_of(_Settings, "settings")
@working
def capture(
    console: Console,
    location: Location,
    prompt_sets: PromptSetOptions,
    model: ModelOptions,
    cluster: ClusterOptions,
    settings: _Settings,
) -> None:
    """Generate from prompts and capture what the model computes, token by token.

    Writes the residual stream to experiments/NAME/inference/raw/residual, the other views that you ask for next to it,
    and projections onto the experiment's trait vectors, or onto the packaged ones for the embedded model.
    """
    layout = location.layout
    prompt_sets, settings = _named_variant(prompt_sets, settings)
    if settings.replay and (note := without_effect_on_replay()) is not None:
        console.warn(note)
    responses = settings.variants.responses(location.root)
    given = None if responses is not None else _given(prompt_sets, settings)
    sets, refused = ([given], []) if given is not None else _prompt_sets(location, prompt_sets, responses)
    load = settings.variants.adapted(model.loader_for(layout, "inference_model", console))
    if not settings.skip_existing:  # with it, there may be nothing to do that needs the model
        load.require()
    _check_vectors(location, settings)
    executor = cluster.make_executor(settings.batch_size, can_collect=not settings.projections_only)
    from tlcapture.commands.capture import run_capture
    from tlcapture.commands.capturing.adhoc_prompts import numbered_on
    from tlcapture.commands.capturing.interventions import with_vectors

    options = with_vectors(settings.capture_options(responses), layout, load)
    if responses is not None:
        check_target(responses, layout, sets, options.variant)
    if given is not None:
        sets = [numbered_on(layout, given)]
    if settings.dry_run:
        _show_estimate(console, layout, sets, refused, options, load, elsewhere=cluster.executor != "local")
        console.next = "the same without --dry-run"
        return

    def renumber(layout: Layout, prompt_set: PromptSet) -> PromptSet:
        sets[0] = numbered_on(layout, prompt_set)
        return sets[0]

    report = run_capture(layout, sets, options, load, console, executor, refused, renumber=renumber if given else None)
    if report.failures and not report.n_files:
        return  # projections of an earlier run would look like this run's
    ids = [prompt.id for prompt in sets[0].prompts] if given else []
    for prompt_set in sets if not options.replay else ():
        show_top_traits(console, layout, options.capture_set(prompt_set.name), "residual", report, ids)
    console.next = _next_step(location, options, load.name)


def _next_step(location: Location, options: CaptureOptions, model: str) -> str:
    """The page, or the extraction of vectors if there are none to project onto."""
    vectors = options.vectors.or_packaged(location.layout, model)
    has_vectors = vectors.experiment is not None or bool(location.layout.traits())
    return location.command("view" if has_vectors or not options.projects else "extract")


def _given(chosen: PromptSetOptions, settings: _Settings) -> PromptSet | None:
    """The prompts that are given as text or files; `None` where prompt sets are named."""
    if sum([chosen.prompt_set is not None, settings.prompts.are_given, chosen.all_prompt_sets]) != 1:
        raise click.UsageError(
            "give one of --prompt-set NAME, --prompt TEXT (or --prompt-file FILE) and --all-prompt-sets"
        )
    return settings.prompts.read() if settings.prompts.are_given else None


def _named_variant(chosen: PromptSetOptions, settings: _Settings) -> tuple[PromptSetOptions, _Settings]:
    """The prompt sets without their variant, which `--prompt-set SET@VARIANT` names as `--variant` does."""
    named = {variant_of(name) for name in chosen.prompt_set or ()}
    if named <= {None}:
        return chosen, settings
    if len(named | {settings.interventions.variant} - {None}) > 1 or None in named:
        raise click.UsageError("--prompt-set SET@VARIANT: expected the same variant for all sets, as --variant NAME")
    sets = tuple(base_set(name) for name in chosen.prompt_set or ())
    interventions = replace(settings.interventions, variant=named.pop())
    return replace(chosen, prompt_set=sets), replace(settings, interventions=interventions)


def _prompt_sets(
    location: Location, chosen: PromptSetOptions, responses: GivenResponses | None
) -> tuple[list[PromptSet], list[tuple[str, str]]]:
    """The prompt sets to capture, and the names of those, or of captures, that cannot be read, with the reasons."""
    from tlcapture.prompts.prompt_sets import ADHOC, read_all_prompt_sets, read_prompt_set

    if responses is not None:
        return responses.prompt_sets(chosen.prompt_set or ())
    if chosen.prompt_set is None:
        return read_all_prompt_sets(location.datasets)
    sets: list[PromptSet] = []
    refused: list[tuple[str, str]] = []
    for name in chosen.prompt_set:
        found = None
        if name == ADHOC and name not in location.datasets.prompt_sets():
            from tlcapture.commands.capturing.adhoc_prompts import captured_adhoc

            found, refused = captured_adhoc(location.layout)
        sets.append(found or read_prompt_set(location.datasets, name))
    return sets, refused


def _check_vectors(location: Location, settings: _Settings) -> None:
    """Raise `InputError` if the experiment that vectors are taken from does not exist, or has none."""
    experiment = settings.vectors.vector_experiment
    if experiment is None or (settings.no_project and not settings.interventions.are_given):
        return
    from tlcapture.traits.vector_files import traits_with_vectors
    from tlcapture.traits.vector_sources.packaged import vectors_layout

    source = vectors_layout(location.root, experiment)
    source.check_exists()
    traits_with_vectors(source)


def _show_estimate(
    console: Console,
    layout: Layout,
    sets: Sequence[PromptSet],
    refused: Sequence[tuple[str, str]],
    options: CaptureOptions,
    load: ModelLoader,
    *,
    elsewhere: bool,
) -> None:
    from tlcapture.commands.capture import estimate_capture
    from tlcapture.runs.report import Failed
    from tlcapture.storage.files import free_bytes
    from tlcapture.storage.remote.roots import is_remote

    estimate, affected = estimate_capture(layout, sets, options, load, elsewhere=elsewhere)
    free = None if is_remote(layout.folder) else free_bytes(layout.folder)
    failures = [*(Failed(*each) for each in refused), *estimate.failures, *affected.failures]
    changes = {
        name: [path.relative_to(layout.folder).as_posix() for path in paths]
        for name, paths in (("replaces", affected.replaced), ("removes", affected.removed))
    }
    facts = {**estimate.to_json(), **changes, "failures": [failed._asdict() for failed in failures], "free": free}
    console.uses(estimate=facts)
    completed = f", {counted(estimate.n_completed, 'capture')} to complete" if estimate.n_completed else ""
    what = counted(estimate.n_prompts, "prompt" if options.samples is None else "response")
    console.line(f"{what} to capture{completed}; at most about:")
    kinds = {**estimate.by_kind, "total": (estimate.n_files, estimate.n_bytes)}
    rows = [(kind, counted(count, "file"), format_bytes(size)) for kind, (count, size) in kinds.items()]
    console.table([Column(), Column(right=True), Column(right=True)], rows)
    if free is not None:
        console.line(f"free on the device: {format_bytes(free)}")
    console.line(f"memory of the largest prompt, beside the weights: {format_bytes(estimate.memory)}")
    _show_changes(console, "would replace", changes["replaces"])
    _show_changes(console, "would remove, unless the tokens stay the same", changes["removes"])
    for failed in failures:
        console.line(f"would fail: {failed}")


def _show_changes(console: Console, what: str, paths: Sequence[str]) -> None:
    for path in paths[:_MOST_PATHS]:
        console.line(f"{what}: {path}")
    if len(paths) > _MOST_PATHS:
        console.line(f"{what}: {len(paths) - _MOST_PATHS} more files (--json lists all)")
