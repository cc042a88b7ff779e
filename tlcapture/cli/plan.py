"""`tlcapture plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tlcapture.cli.command import command
from tlcapture.cli.options.grouping import option, options_of, shared
from tlcapture.cli.options.shared import KeptOptions, save_dtype_option
from tlcapture.cli.options.types import BatchSize, ByteSize, Count, Finite, Views
from tlcapture.cli.output.console import Console, one_line_errors
from tlcapture.cli.output.plan import Estimate
from tlcapture.plan.accelerators import ACCELERATORS

if TYPE_CHECKING:
    import torch

    from tlcapture.commands.capturing.options import CaptureOptions
    from tlcapture.plan.cost import Pace, Workload

_DEFAULT_BATCH = 16
_LOWEST = 1e-6  # tokens per second, or share of a bound: a duration stays a number that can be read
_LONGEST = 10_000_000  # tokens, which are counted one by one
_MOST_TRAITS = 1_000_000


@dataclass(frozen=True)
class _WorkloadOptions:
    """The prompts, and what to capture from them."""

    prompts: int = option("--prompts", type=Count(), required=True, help="Number of prompts.")
    prompt_tokens: int = option(
        "--prompt-tokens",
        type=click.IntRange(1, _LONGEST),
        required=True,
        help="Mean number of tokens of a prompt, with its chat template.",
    )
    new_tokens: int = option(
        "--new-tokens", type=click.IntRange(1, _LONGEST), required=True, help="Mean number of tokens of a response."
    )
    samples: int | None = option("--samples", type=Count(), help="Responses to each prompt.  [default: one]")
    views: tuple[str, ...] = option(
        "--views",
        type=Views(),
        default="residual",
        show_default=True,
        help=f"Views to keep: {', '.join(Views.NAMES)}; internals:L for one layer. Projections without residual are "
        "what --projections-only keeps.",
    )
    traits: int = option(
        "--traits",
        type=click.IntRange(1, _MOST_TRAITS),
        default=10,
        show_default=True,
        help="Number of traits to project onto.",
    )
    kept: KeptOptions = shared(KeptOptions)
    save_dtype: str = shared(save_dtype_option)
    batch_size: int | None = option(
        "--batch-size",
        type=BatchSize(),
        default="auto",
        show_default=True,
        help=f"Prompts that run together; auto: {_DEFAULT_BATCH} with --gpu, as many as fit with --measure.",
    )

    def workload(self) -> Workload:
        """The workload to plan for."""
        from tlcapture.plan.cost import Workload

        options = self._capture_options()
        vectors = self.traits * len(options.components) if "projections" in self.views else 0
        return Workload(self.prompts, self.prompt_tokens, options, vectors)

    def _capture_options(self) -> CaptureOptions:
        from tlcapture.commands.capturing.options import ALL_LAYERS, CaptureOptions

        layers = tuple(int(view.partition(":")[2]) for view in self.views if view.startswith("internals:"))
        return CaptureOptions(
            projections_only="residual" not in self.views,
            capture_attn="attn_out" in self.views,
            attention="attention" in self.views,
            logit_lens="logit_lens" in self.views,
            internals=ALL_LAYERS if "internals" in self.views else layers,
            layers=self.kept.layers,
            points=self.kept.points,
            tokens=self.kept.tokens,
            parts=self.kept.parts,
            save_dtype=self.save_dtype,
            batch_size=self.batch_size,
            max_new_tokens=self.new_tokens,
            samples=self.samples,
        )


@dataclass(frozen=True)
class _PaceOptions:
    """Where the speed of a worker comes from, if it is wanted."""

    tokens_per_second: float | None = option(
        "--tokens-per-second", type=Finite(_LOWEST), help="New tokens per second of one worker."
    )
    measure: bool = option("--measure", is_flag=True, help="Load the model and time a few batches on this machine.")
    gpu: str | None = option(
        "--gpu",
        type=click.Choice(list(ACCELERATORS)),
        help="Take the speed from a GPU's data sheet: its bound, times --efficiency.",
    )
    efficiency: float = option(
        "--efficiency",
        type=Finite(_LOWEST, 1),
        default=0.2,
        show_default=True,
        help="Share of --gpu's bound that is reached. This is an assumption; --measure is more accurate.",
    )

    def check(self) -> None:
        """Raise a usage error if more than one source is given."""
        if sum([self.tokens_per_second is not None, self.measure, self.gpu is not None]) > 1:
            raise click.UsageError("give one of --tokens-per-second, --measure and --gpu")

    def pace(self, model: str, config: Any, workload: Workload) -> Pace | None:
        """The speed of one worker, `None` if no source is given; measuring loads the model."""
        from tlcapture.plan.cost import Pace

        if self.tokens_per_second is not None:
            return Pace(self.tokens_per_second, "given")
        if self.measure:
            return _measured(model, workload)
        return None if self.gpu is None else _bound(self.gpu, config, workload, self.efficiency)


@command(
    "tlcapture plan --prompts 5000 --prompt-tokens 60 --new-tokens 50",
    "tlcapture plan --prompts 5000 --prompt-tokens 60 --new-tokens 50 --gpu h100 --budget 50GB",
)
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    metavar="NAME",
    help="smollm2 (embedded), a folder with a Hugging Face config, a GGUF file, or a hub name (also name@revision).",
)
@options_of(_WorkloadOptions, "wanted")
@click.option("--workers", type=Count(), default=1, show_default=True, help="Number of runs in parallel.")
@options_of(_PaceOptions, "speed")
@click.option("--budget", type=ByteSize(), help="Suggest what to leave out to fit a size, for example 500GiB.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the table.")
@one_line_errors
def plan(
    model: str,
    wanted: _WorkloadOptions,
    speed: _PaceOptions,
    workers: int,
    budget: int | None,
    as_json: bool,
) -> None:
    """Estimate what a capture costs: bytes by view, model time, and what fits a budget.

    Reads only the model's config, unless --measure loads the model. Writes nothing.
    """
    speed.check()
    from tlcapture.models.checkpoints.sources import check_name

    check_name(model)
    import torch

    from tlcapture.models.checkpoints.checkpoint import fetch_config, quiet_loading
    from tlcapture.models.checkpoints.sources import source_of
    from tlcapture.models.sizes import Measures
    from tlcapture.plan.cost import cost_of
    from tlcapture.plan.memory import memory_of
    from tlcapture.plan.reductions import reductions

    with quiet_loading():
        config = fetch_config(model, source_of(model, weights=False))
    measures = Measures.of(config)
    workload = wanted.workload()
    cost = cost_of(workload, measures)
    pace = speed.pace(model, config, workload)
    found = [] if budget is None else reductions(workload, measures, budget)
    on_gpu = speed.gpu is not None
    memory = memory_of(workload, measures, _dtype(config) if on_gpu else torch.float32, "cuda" if on_gpu else "cpu")
    estimate = Estimate(model, measures, workload, cost, pace, workers, budget, found, memory)
    if as_json:
        click.echo(json.dumps(estimate.to_json()))
    else:
        estimate.echo()


def _measured(name: str, workload: Workload) -> Pace:
    from tlcapture.plan.pace import measured_pace
    from tlcapture.runs.model_loader import ModelLoader

    return measured_pace(ModelLoader(name, Console(quiet=True))(), workload)


def _dtype(config: Any) -> torch.dtype:
    import torch

    return getattr(config.get_text_config(), "dtype", None) or torch.float32


def _bound(gpu: str, config: Any, workload: Workload, efficiency: float) -> Pace:
    from tlcapture.models.checkpoints.checkpoint import count_parameters
    from tlcapture.models.sizes import Measures
    from tlcapture.plan.cost import bound_pace

    return bound_pace(
        gpu,
        ACCELERATORS[gpu],
        Measures.of(config),
        n_parameters=count_parameters(config),
        bytes_per_weight=_dtype(config).itemsize,
        workload=workload,
        batch_size=workload.options.batch_size or _DEFAULT_BATCH,
        efficiency=efficiency,
    )
