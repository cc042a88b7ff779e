"""What capturing a prompt set will cost, before there is one: bytes by view, model time, and what fits a budget.

    workload = Workload(n_prompts=5000, prompt_tokens=60, options=CaptureOptions(attention=True), n_projections=10)
    cost = cost_of(workload, outline.measures)
    cost.n_bytes, cost.by_view["raw residual"].each

Bytes are those of `tlcapture.commands.capture_size`, for prompts that are all as long as the mean. Time is new tokens
by tokens a second, given or measured, or what an accelerator's data sheet allows: `step_bound`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tlcapture.commands.capture_size import sizes
from tlcapture.commands.capture_tasks import CaptureOptions
from tlcapture.models.sizes import Measures
from tlcapture.plan.accelerators import Accelerator


@dataclass(frozen=True)
class Workload:
    """Prompts and what is captured of them. Token counts are means, `options.max_new_tokens` that of responses;
    `n_projections` counts vectors, of both components."""

    n_prompts: int
    prompt_tokens: int
    options: CaptureOptions
    n_projections: int = 0

    @property
    def n_new_tokens(self) -> int:
        """New tokens of all prompts."""
        return self.n_prompts * self.options.max_new_tokens


@dataclass(frozen=True)
class ViewCost:
    """A view's files and bytes of each prompt."""

    files: int
    each: float


@dataclass(frozen=True)
class Cost:
    """What a workload writes. Bytes are those of all prompts but where a name says otherwise."""

    n_prompts: int
    by_view: Mapping[str, ViewCost]

    @property
    def bytes_per_prompt(self) -> float:
        return sum(view.each for view in self.by_view.values())

    @property
    def n_bytes(self) -> float:
        return self.n_prompts * self.bytes_per_prompt

    @property
    def n_files(self) -> int:
        return self.n_prompts * sum(view.files for view in self.by_view.values())

    def to_json(self) -> dict[str, Any]:
        views = {
            name: {
                "files_per_prompt": view.files,
                "bytes_per_prompt": round(view.each),
                "bytes": round(self.n_prompts * view.each),
            }
            for name, view in self.by_view.items()
        }
        return {
            "prompts": self.n_prompts,
            "files": self.n_files,
            "bytes_per_prompt": round(self.bytes_per_prompt),
            "bytes": round(self.n_bytes),
            "views": views,
        }


def cost_of(workload: Workload, measures: Measures) -> Cost:
    """Bytes by view. Raises `InputError` for layers that the model has not."""
    options = workload.options
    wanted = options.outputs(measures.n_layers)
    n_tokens = workload.prompt_tokens + options.max_new_tokens
    found: dict[str, ViewCost] = {}
    for kind, size in sizes(measures, n_tokens, wanted, options, workload.n_projections):
        before = found.get(kind, ViewCost(0, 0.0))
        found[kind] = ViewCost(before.files + 1, before.each + size)
    return Cost(workload.n_prompts, found)


# -- time -----------------------------------------------------------------------------------------


# What calling a block's operations takes by itself: `make bench-scale` measures it, on a model too small for
# anything else to matter. The same calls start an accelerator's kernels.
SECONDS_A_LAYER = 0.0003


@dataclass(frozen=True)
class Pace:
    """New tokens that one worker makes a second, captured and written, and where the number is from."""

    tokens_per_second: float
    source: str

    def seconds(self, workload: Workload) -> float:
        """One worker's time for all prompts."""
        return workload.n_new_tokens / self.tokens_per_second


def bound_pace(
    name: str,
    accelerator: Accelerator,
    measures: Measures,
    *,
    n_parameters: int,
    bytes_per_weight: int,
    workload: Workload,
    batch_size: int,
    efficiency: float,
) -> Pace:
    """The pace that an accelerator's data sheet allows, times an efficiency.

    A step of decoding reads all weights and the batch's keys and values once; it cannot be faster than the
    memory, nor than its 2 floating-point operations a weight and token. The prompt's pass is bound by the latter.
    Neither is faster than this process can call the operations of all layers, `SECONDS_A_LAYER` each.
    """
    options, prompt = workload.options, workload.prompt_tokens
    weights = n_parameters * bytes_per_weight
    context = prompt + options.max_new_tokens / 2
    keys_and_values = 2 * measures.n_layers * measures.n_key_value_heads * measures.d_head * bytes_per_weight * context
    operations = 2 * n_parameters * batch_size
    step = max((weights + batch_size * keys_and_values) / accelerator.bandwidth, operations / accelerator.flops)
    first = max(weights / accelerator.bandwidth, operations * prompt / accelerator.flops)
    calls = measures.n_layers * SECONDS_A_LAYER
    # The last new token gets a step of its own, so that it has its activations.
    seconds = max(first / efficiency, calls) + options.max_new_tokens * max(step / efficiency, calls)
    pace = batch_size * options.max_new_tokens / seconds
    return Pace(pace, f"{name} at {efficiency:g} of its bounds, batches of {batch_size}")


# -- what to leave out ----------------------------------------------------------------------------

Changes = dict[str, Any]


@dataclass(frozen=True)
class Reduction:
    """A way to write less: the options to pass or to leave out, and what all prompts then come to."""

    options: str
    n_bytes: float


def reductions(workload: Workload, measures: Measures, budget: float) -> list[Reduction]:
    """Ways to write less than `workload` does: each by itself, and as many of them together as a budget of bytes
    asks for. Of layers as many are kept as fit."""
    here = cost_of(workload, measures).n_bytes
    found: list[Reduction] = []
    for said, changes in [*_single(workload, measures, budget), *_together(workload, measures, budget)]:
        n_bytes = _bytes_with(workload, measures, changes)
        if n_bytes < here and said not in [each.options for each in found]:
            found.append(Reduction(said, n_bytes))
    return found


def _bytes_with(workload: Workload, measures: Measures, changes: Mapping[str, Any]) -> float:
    return cost_of(replace(workload, options=replace(workload.options, **changes)), measures).n_bytes


def _left_out(options: CaptureOptions) -> Iterator[tuple[str, Changes]]:
    """Views that go, the largest first, and then points."""
    if options.internals:
        yield "without --layer-internals", {"internals": ()}
    if options.attention:
        yield "without --attention", {"attention": False}
    if options.logit_lens:
        yield "without --logit-lens", {"logit_lens": False}
    if options.save_dtype == "float32" and not options.projections_only:
        yield "--save-dtype bfloat16", {"save_dtype": "bfloat16"}
    if options.points != ("residual_out",):
        yield "--points residual_out", {"points": ("residual_out",)}


def _single(workload: Workload, measures: Measures, budget: float) -> Iterator[tuple[str, Changes]]:
    yield from _left_out(workload.options)
    yield _with_fewer_layers(workload, measures, budget, {})
    if workload.n_projections and not workload.options.projections_only:
        yield _PROJECTIONS_ONLY


def _together(workload: Workload, measures: Measures, budget: float) -> Iterator[tuple[str, Changes]]:
    words: list[str] = []
    changes: Changes = {}
    for said, change in _left_out(workload.options):
        if _bytes_with(workload, measures, changes) <= budget:
            break
        words, changes = [*words, said], {**changes, **change}
    if _bytes_with(workload, measures, changes) > budget:
        said, change = _with_fewer_layers(workload, measures, budget, changes)
        yield ", ".join([*words, said]), {**changes, **change}
        if workload.n_projections and not workload.options.projections_only:
            views = [word for word in words if word.startswith("without")]
            yield (
                ", ".join([*views, _PROJECTIONS_ONLY[0]]),
                {
                    **{name: value for name, value in changes.items() if name in ("attention", "logit_lens")},
                    **_PROJECTIONS_ONLY[1],
                },
            )
    else:
        yield ", ".join(words), changes


_PROJECTIONS_ONLY: tuple[str, Changes] = ("--projections-only", {"projections_only": True, "internals": ()})


def _with_fewer_layers(workload: Workload, measures: Measures, budget: float, changes: Changes) -> tuple[str, Changes]:
    """As many evenly spread layers as fit, at least one."""
    layers = workload.options.layers or tuple(range(measures.n_layers))

    def spread(count: int) -> tuple[int, ...]:
        return tuple(layers[(2 * place + 1) * len(layers) // (2 * count)] for place in range(count))

    counts = range(len(layers), 1, -1)
    fitting = (n for n in counts if _bytes_with(workload, measures, {**changes, "layers": spread(n)}) <= budget)
    chosen = spread(next(fitting, 1))
    return f"--layers {','.join(map(str, chosen))}", {"layers": chosen}
