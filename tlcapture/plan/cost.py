"""The cost of capturing a prompt set that does not exist yet: bytes by view, and model time.

    workload = Workload(n_prompts=5000, prompt_tokens=60, options=CaptureOptions(attention=True), n_projections=10)
    cost = cost_of(workload, outline.measures)
    cost.n_bytes, cost.by_view["raw residual"].each

Bytes are those of `tlcapture.commands.capturing.size`, for prompts that are all as long as the mean. Time is new tokens
divided by tokens per second, which are given, measured, or bounded by an accelerator's data sheet: `bound_pace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.size import file_sizes
from tlcapture.models.sizes import Measures
from tlcapture.plan.accelerators import Accelerator
from tlcapture.views.kept_tokens import kept_of


@dataclass(frozen=True)
class Workload:
    """Prompts, and what is captured from them.

    Attributes:
        n_prompts: number of prompts.
        prompt_tokens: mean number of tokens of a prompt.
        options: what to capture; `max_new_tokens` is the mean number of tokens of a response.
        n_projections: number of vectors to project onto, over both components.
    """

    n_prompts: int
    prompt_tokens: int
    options: CaptureOptions
    n_projections: int = 0

    @property
    def n_captures(self) -> int:
        """Prompts times samples."""
        return self.n_prompts * (self.options.samples or 1)

    @property
    def n_new_tokens(self) -> int:
        """New tokens of all responses."""
        return self.n_captures * self.options.max_new_tokens


@dataclass(frozen=True)
class ViewCost:
    """The output of one view: `files` and `each`, its bytes, per prompt with all of its samples."""

    files: int
    each: float


@dataclass(frozen=True)
class Cost:
    """The output of a workload: for all prompts, unless a name says per prompt."""

    n_prompts: int
    by_view: Mapping[str, ViewCost]

    @property
    def bytes_per_prompt(self) -> float:
        """Bytes of one prompt, over all views."""
        return sum(view.each for view in self.by_view.values())

    @property
    def n_bytes(self) -> float:
        """Bytes of all prompts, over all views."""
        return self.n_prompts * self.bytes_per_prompt

    @property
    def n_files(self) -> int:
        """Files of all prompts, over all views."""
        return self.n_prompts * sum(view.files for view in self.by_view.values())

    def to_json(self) -> dict[str, Any]:
        """The totals, and the files and bytes of each view, as whole numbers."""
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
    """The cost of a workload on a model of these measures.

    Raises:
        InputError: a layer that the model does not have.
    """
    options = workload.options
    wanted = options.outputs(measures.n_layers)
    kept = kept_of(options.tokens, workload.prompt_tokens, workload.prompt_tokens + options.max_new_tokens)
    found: dict[str, ViewCost] = {}
    for kind, size in file_sizes(measures, kept, wanted, options, workload.n_projections):
        before, count = found.get(kind, ViewCost(0, 0.0)), options.samples or 1
        found[kind] = ViewCost(before.files + count, before.each + count * size)
    return Cost(workload.n_prompts, found)


# The time it takes to call a block's operations, or to launch their kernels. `make bench-scale` measures it on a
# model that is too small for anything else to matter.
SECONDS_PER_LAYER = 0.0003


@dataclass(frozen=True)
class Pace:
    """The speed of one worker.

    Attributes:
        tokens_per_second: new tokens per second, captured and written.
        source: where the number comes from, for display.
    """

    tokens_per_second: float
    source: str

    def seconds(self, workload: Workload) -> float:
        """One worker's time for all prompts, in seconds."""
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
    """The pace that an accelerator's data sheet allows, times an efficiency (between 0 and 1).

    A decoding step reads all weights and the batch's keys and values once, so memory bandwidth bounds it, as do its
    2 floating-point operations per weight and token. These operations, and one reading of the weights, bound the
    prompt's forward pass. Neither is faster than this process can call the operations of all layers,
    `SECONDS_PER_LAYER` each.
    """
    options, prompt = workload.options, workload.prompt_tokens
    weights = n_parameters * bytes_per_weight
    context = prompt + options.max_new_tokens / 2
    keys_and_values = 2 * measures.n_layers * measures.n_key_value_heads * measures.d_head * bytes_per_weight * context
    operations = 2 * n_parameters * batch_size
    step = max((weights + batch_size * keys_and_values) / accelerator.bandwidth, operations / accelerator.flops)
    # Samples of a prompt, which is run once, are rows of the batch.
    n_read = min(options.samples or 1, batch_size)
    first = max(weights / accelerator.bandwidth, operations / n_read * prompt / accelerator.flops)
    calls = measures.n_layers * SECONDS_PER_LAYER
    # The last new token is run as well, so that its activations are captured.
    seconds = max(first / efficiency, calls) + options.max_new_tokens * max(step / efficiency, calls)
    pace = batch_size * options.max_new_tokens / seconds
    return Pace(pace, f"{name} at {efficiency:g} of its bounds, batches of {batch_size}")
