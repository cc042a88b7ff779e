"""Whether each of a capture's prompts would fit in memory alone, checked before any of them runs.

A batch that runs out of memory is halved, down to one prompt; one that does not fit then would end the process on a
machine without memory to spare. Most of the memory is for attention patterns: the pass that reads the prompt
holds the patterns of all layers at once. `--replay` reads a capture in several passes if needed, some layers at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tlcapture.captures.capture import Capture
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.capturing.tasks import CaptureTask
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.commands.prompt_files.replay import one_layer_at_a_time
from tlcapture.commands.prompt_files.view_files import n_attention_weights, weights_in_memory
from tlcapture.errors import InputError, StorageError
from tlcapture.models.loading import DTYPES, Model, pick_device
from tlcapture.models.memory import BatchBytes, batch_bytes, free_memory
from tlcapture.models.sizes import Measures
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.storage.compact.compact_files import PER_WEIGHT, is_written_compact
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import format_bytes
from tlcapture.views.hooks import HOOKS, hook
from tlcapture.views.kept_tokens import Positions, kept_of

_JSON_COPIES = 3  # of a JSON file while it is made: rounded weights, and a buffer that grows


@dataclass(frozen=True)
class Sized:
    """The properties of a model that its memory depends on, known before its weights are loaded."""

    measures: Measures
    dtype: torch.dtype
    device: torch.device
    computes_scores: bool = True
    most_prompt_positions: int | None = None

    @classmethod
    def of(cls, measures: Measures, device: str, dtype: str) -> Sized:
        """The properties of a model loaded with these options; `auto` is bfloat16 except on a CPU."""
        found = pick_device(device)
        usual = torch.float32 if found.type == "cpu" else torch.bfloat16
        return cls(measures, DTYPES.get(dtype, usual), found)

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.measures.n_layers

    @property
    def hook_names(self) -> frozenset[str]:
        """The activations that a model of these sizes has, all of them in every layer."""
        return frozenset(hook(name, layer) for name in HOOKS for layer in range(self.n_layers))


@dataclass(frozen=True)
class MemoryNeed:
    """The memory that a prompt takes while it runs alone, in bytes: on the model's device, and in main memory."""

    device: int
    main: int

    @property
    def n_bytes(self) -> int:
        """Both together."""
        return self.device + self.main


def memory_need(
    model: Model | Sized, wanted: Outputs, n_prompt: int, n_tokens: int, *, replay: bool = False
) -> MemoryNeed:
    """The memory for a prompt of `n_prompt` tokens, `n_tokens` with its response, without the weights.

    With `replay` it is read with the patterns of as few layers at a time as necessary.
    """
    hooks = wanted.pass_hooks(model) if replay else wanted.live_hooks(model)
    in_passes = one_layer_at_a_time(hooks) if replay and wanted.parts.form != "json" else [hooks]
    above = weights_in_memory(wanted.parts.form)
    each = [batch_bytes(model, n_tokens, names, n_prompt, spooled_above=above) for names in in_passes]
    largest = max(each, key=lambda found: found.on_device(1))
    kept = kept_of(None if replay else wanted.tokens, n_prompt, n_tokens)
    return MemoryNeed(largest.on_device(1), _in_main_memory(model.measures, each, wanted, kept))


def _in_main_memory(measures: Measures, each: Sequence[BatchBytes], wanted: Outputs, tokens: Positions) -> int:
    recorded = sum(found.recorded + found.patterns for found in each)
    if not wanted.attention:
        return recorded
    json = n_attention_weights(measures, wanted.parts, tokens) * PER_WEIGHT
    return recorded + (0 if is_written_compact(wanted.parts.form, json) else int(_JSON_COPIES * json))


@dataclass(frozen=True)
class PromptLength:
    """The tokens of a prompt, or of a capture to be read again, and the outputs wanted of it."""

    name: str
    wanted: Outputs
    n_prompt: int
    n_tokens: int
    replay: bool

    def need(self, model: Model | Sized) -> MemoryNeed:
        """The memory it takes while it runs alone."""
        return memory_need(model, self.wanted, self.n_prompt, self.n_tokens, replay=self.replay)


def check_memory(tasks: Sequence[CaptureTask], layout: Layout, options: CaptureOptions, model: Model | Sized) -> None:
    """Raise `InputError` if the largest prompt does not fit in the memory that is free, even alone."""
    check_they_fit(prompt_lengths(tasks, layout, options, model.n_layers), model)


def check_they_fit(lengths: Sequence[PromptLength], model: Model | Sized) -> None:
    """Raise `InputError` if a prompt does not fit in the memory that is free in this process's machine, even alone."""
    for prompt in _that_fit_the_context(lengths, model):
        need = prompt.need(model)
        device, main = free_memory(model.device), free_memory(torch.device("cpu"))
        is_main = model.device.type != "cuda"
        if (need.n_bytes > main) if is_main else (need.device > device or need.main > main):
            free = main if is_main or need.main > main else device
            raise InputError(
                f"{prompt.name}: {prompt.n_tokens} tokens would take about {format_bytes(need.n_bytes)} of memory, "
                f"{format_bytes(free)} are free: {_advice(prompt.wanted, prompt.replay)}"
            )


def most_memory(tasks: Sequence[CaptureTask], layout: Layout, options: CaptureOptions, model: Model | Sized) -> int:
    """The bytes that the largest prompt takes while it runs alone, without the weights."""
    lengths = _that_fit_the_context(prompt_lengths(tasks, layout, options, model.n_layers), model)
    return max((prompt.need(model).n_bytes for prompt in lengths), default=0)


def prompt_lengths(
    tasks: Sequence[CaptureTask], layout: Layout, options: CaptureOptions, n_layers: int
) -> list[PromptLength]:
    """The prompts to be run and the captures to be read again, one of each length, the longest first."""
    found: list[PromptLength] = []
    for task in tasks:
        found += _by_length(_of_fresh(task, options, n_layers))
        found += _by_length(_of_saved(task, layout))
    return found


def _of_fresh(task: CaptureTask, options: CaptureOptions, n_layers: int) -> list[PromptLength]:
    if not task.fresh:
        return []
    wanted = options.outputs(n_layers)
    return [
        PromptLength(f"{task.capture_set}/{each.name}", wanted, len(each.token_ids), _n_at_most(each, task), False)
        for each in task.fresh_prompts
    ]


def _of_saved(task: CaptureTask, layout: Layout) -> list[PromptLength]:
    found = []
    for name, lacking in task.saved.items():
        if lacking.needs_pass:
            length = _n_tokens(layout, task.capture_set, name)
            found.append(PromptLength(f"{task.capture_set}/{name}", lacking, length, length, True))
    return found


def _by_length(lengths: Sequence[PromptLength]) -> list[PromptLength]:
    found: dict[int, PromptLength] = {}
    for prompt in lengths:
        found.setdefault(prompt.n_tokens, prompt)
    return [found[n_tokens] for n_tokens in sorted(found, reverse=True)]


def _that_fit_the_context(lengths: Sequence[PromptLength], model: Model | Sized) -> list[PromptLength]:
    """The longest prompt of each set to run, and to read again; prompts too long for the context fail anyway."""
    most = getattr(model, "n_ctx", None) or 2**62
    found: dict[tuple[str, bool], PromptLength] = {}
    for prompt in lengths:
        if prompt.replay or prompt.n_tokens <= most:
            found.setdefault((prompt.name.rpartition("/")[0], prompt.replay), prompt)
    return list(found.values())


def _n_at_most(prompt: TokenizedPrompt, task: CaptureTask) -> int:
    """The tokens of a prompt with its longest possible response; the length of a given response is known."""
    return len(prompt.token_ids) + (task.max_new_tokens if prompt.known is None else len(prompt.forced or ()))


def _n_tokens(layout: Layout, prompt_set: str, prompt_id: str | int) -> int:
    try:
        return len(Capture.open(layout.residual(prompt_set, prompt_id)).token_ids)
    except StorageError:
        return 0  # reported when it is read


def _advice(wanted: Outputs, replay: bool) -> str:
    ways = []
    if wanted.attention and wanted.parts.form == "json":
        ways.append("leave out --format json")
    if wanted.attention and not replay:
        ways.append("capture without --attention and add it with --replay, which reads some layers at a time")
        ways.append("keep fewer layers with --attention-layers")
    ways.append("shorten the prompt" if replay else "shorten the prompt or lower --max-new-tokens")
    return ", or ".join(ways)
