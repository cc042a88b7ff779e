"""`tlcapture plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.console import Console, one_line_errors
from tlcapture.cli.options import BatchSize, ByteSize, kept_options, save_dtype_option
from tlcapture.names import split_names
from tlcapture.plan.accelerators import ACCELERATORS
from tlcapture.text import printable

if TYPE_CHECKING:
    from tlcapture.plan.cost import Pace, Workload
    from tlcapture.plan.reductions import Change, Changes

VIEWS = ("residual", "attn_out", "attention", "logit_lens", "internals", "projections")
_DEFAULT_BATCH = 16
_HOUR = 3600
_OPTION_NAMES = {"internals": "layer-internals"}  # where an option is not called like its field of CaptureOptions


class Views(click.ParamType):
    """Comma-separated views; `internals:L` is those of one layer."""

    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        views = tuple(dict.fromkeys(split_names(value)))
        for view in views:
            name, colon, layer = view.partition(":")
            if name not in VIEWS or (colon and (name != "internals" or not layer.isdecimal())):
                self.fail(
                    f"{view!r} is no view: choose of {', '.join(VIEWS)} (internals:12 is one layer's).", param, ctx
                )
        if not {"residual", "projections"} & set(views):
            self.fail("a capture keeps residual, projections or both: name one of them.", param, ctx)
        return views


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="NAME",
    help="smollm2 (embedded), a folder with a Hugging Face config, or a hub name.",
)
@click.option("--prompts", type=click.IntRange(min=1), required=True, help="How many prompts.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), required=True, help="Mean tokens of a prompt, as run.")
@click.option("--new-tokens", type=click.IntRange(min=1), required=True, help="Mean tokens of a response.")
@click.option(
    "--views",
    type=Views(),
    default="residual",
    show_default=True,
    help=f"Of {', '.join(VIEWS)}; internals:L is one layer's. projections without residual: --projections-only.",
)
@click.option("--traits", type=click.IntRange(min=1), default=10, show_default=True, help="Traits to project onto.")
@kept_options
@save_dtype_option
@click.option(
    "--batch-size",
    type=BatchSize(),
    default="auto",
    show_default=True,
    help=f"Prompts that run together; auto: {_DEFAULT_BATCH} for --gpu, what fits for --measure.",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Runs side by side.")
@click.option("--tokens-per-second", type=click.FloatRange(min=0, min_open=True), help="New tokens of one worker.")
@click.option("--measure", is_flag=True, help="Time a few batches of the model here; loads it.")
@click.option(
    "--gpu", type=click.Choice(list(ACCELERATORS)), help="Time from a data sheet: what it allows, times --efficiency."
)
@click.option(
    "--efficiency",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.2,
    show_default=True,
    help="Share of --gpu's bound that is reached: an assumption; --measure knows better.",
)
@click.option("--budget", type=ByteSize(), metavar="SIZE", help="Say what to leave out to fit it, for example 500GB.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object in place of the table.")
@one_line_errors
def plan(
    model: str,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    views: tuple[str, ...],
    traits: int,
    layers: tuple[int, ...],
    points: tuple[str, ...],
    save_dtype: str,
    batch_size: int | None,
    workers: int,
    tokens_per_second: float | None,
    measure: bool,
    gpu: str | None,
    efficiency: float,
    budget: int | None,
    as_json: bool,
) -> None:
    """Say what capturing so many prompts costs: bytes by view, model time, and what fits a budget.

    Reads the model's config only, unless it is to --measure. Writes nothing.
    """
    if sum([tokens_per_second is not None, measure, gpu is not None]) > 1:
        raise click.UsageError("give one of --tokens-per-second, --measure and --gpu")
    from tlcapture.commands.capture_tasks import CaptureOptions
    from tlcapture.models.checkpoints import fetch, quiet_loading, source_of
    from tlcapture.models.sizes import Measures
    from tlcapture.plan.cost import Pace, Workload, cost_of
    from tlcapture.plan.reductions import reductions

    with quiet_loading():
        config = fetch(model, "AutoConfig", source_of(model))
    measures = Measures.of(config)
    options = CaptureOptions(
        **_of_views(views),
        layers=layers,
        points=points,
        save_dtype=save_dtype,
        batch_size=batch_size,
        max_new_tokens=new_tokens,
    )
    vectors = traits * (1 + options.capture_attn) if "projections" in views else 0
    workload = Workload(prompts, prompt_tokens, options, vectors)
    cost = cost_of(workload, measures)
    pace: Pace | None = None
    if tokens_per_second is not None:
        pace = Pace(tokens_per_second, "given")
    elif measure:
        pace = _measured(model, workload)
    elif gpu is not None:
        pace = _bound(gpu, config, measures, workload, efficiency)
    fits = reductions(workload, measures, budget) if budget is not None else []
    said = {"model": model, "workers": workers, **cost.to_json(), **_time_json(workload, pace, workers)}
    if budget is not None:
        said["budget"] = budget
        said["reductions"] = [
            {"options": _options_text(each.changes), "bytes": round(each.n_bytes), "fits": each.n_bytes <= budget}
            for each in fits
        ]
    if as_json:
        import json

        click.echo(json.dumps(said))
        return
    click.echo(f"{printable(model)}: {measures.n_layers} layers, d_model {measures.d_model}")
    for line in [*_table(workload, cost), *_time(said), *_budget(said)]:
        click.echo(line)


def _of_views(views: tuple[str, ...]) -> dict[str, Any]:
    """The options of `capture` that make these views."""
    layers = tuple(int(view.partition(":")[2]) for view in views if view.startswith("internals:"))
    return {
        "projections_only": "residual" not in views,
        "capture_attn": "attn_out" in views,
        "attention": "attention" in views,
        "logit_lens": "logit_lens" in views,
        "internals": "all" if "internals" in views else layers,
    }


def _measured(name: str, workload: Workload) -> Pace:
    from tlcapture.plan.pace import measured_pace
    from tlcapture.runs.model_loader import ModelLoader

    return measured_pace(ModelLoader(name, Console(quiet=True))(), workload)


def _bound(gpu: str, config: Any, measures: Any, workload: Workload, efficiency: float) -> Pace:
    import torch

    from tlcapture.models.checkpoints import count_parameters
    from tlcapture.plan.cost import bound_pace

    dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    return bound_pace(
        gpu,
        ACCELERATORS[gpu],
        measures,
        n_parameters=count_parameters(config),
        bytes_per_weight=dtype.itemsize,
        workload=workload,
        batch_size=workload.options.batch_size or _DEFAULT_BATCH,
        efficiency=efficiency,
    )


def _time_json(workload: Workload, pace: Pace | None, workers: int) -> dict[str, Any]:
    if pace is None:
        return {"new_tokens": workload.n_new_tokens}
    seconds = pace.seconds(workload)
    return {
        "new_tokens": workload.n_new_tokens,
        "tokens_per_second": pace.tokens_per_second,
        "pace": pace.source,
        "worker_hours": seconds / _HOUR,
        "hours": seconds / _HOUR / workers,
    }


def _table(workload: Workload, cost: Any) -> Iterator[str]:
    from tlcapture.text import format_bytes

    new = workload.options.max_new_tokens
    yield f"{cost.n_prompts} prompts of {workload.prompt_tokens} tokens and {new} new ones"
    yield ""
    yield f"{'view':<18}{'files':>12}{'a prompt':>12}{'in all':>12}"
    for name, view in cost.by_view.items():
        sizes = (view.each, cost.n_prompts * view.each)
        yield f"{name:<18}{cost.n_prompts * view.files:>12}" + "".join(f"{format_bytes(size):>12}" for size in sizes)
    sizes = (cost.bytes_per_prompt, cost.n_bytes)
    yield f"{'in all':<18}{cost.n_files:>12}" + "".join(f"{format_bytes(size):>12}" for size in sizes)


def _time(said: dict[str, Any]) -> Iterator[str]:
    yield ""
    if "pace" not in said:
        yield f"{said['new_tokens']} new tokens; for the time give --tokens-per-second, --measure or --gpu"
        return
    yield f"{said['new_tokens']} new tokens at {said['tokens_per_second']:.4g} a second ({said['pace']})"
    on_workers = f", {_duration(said['hours'])} on {said['workers']} workers" if said["workers"] > 1 else ""
    yield f"{said['worker_hours']:.3g} worker-hours ({_duration(said['worker_hours'])}){on_workers}"


def _duration(hours: float) -> str:
    if hours * _HOUR < 90:
        return f"{hours * _HOUR:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h"


def _budget(said: dict[str, Any]) -> Iterator[str]:
    from tlcapture.text import format_bytes

    if "budget" not in said:
        return
    yield ""
    fits = said["bytes"] <= said["budget"]
    yield f"budget {format_bytes(said['budget'])}: {'it fits' if fits else 'it does not fit; it would be'}"
    for each in [] if fits else said["reductions"]:
        verdict = "fits" if each["fits"] else "does not fit"
        yield f"  {format_bytes(each['bytes']):>10}  {verdict:<14}{each['options']}"


def _options_text(changes: Changes) -> str:
    """Changes as options of `tlcapture capture`."""
    return ", ".join(map(_option_text, changes))


def _option_text(change: Change) -> str:
    option = f"--{_OPTION_NAMES.get(change.option, change.option.replace('_', '-'))}"
    if change.leaves_out:
        return f"without {option}"
    if change.value is True:
        return option
    return f"{option} {','.join(map(str, change.value)) if isinstance(change.value, tuple) else change.value}"
