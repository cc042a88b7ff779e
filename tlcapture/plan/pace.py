"""Measures how fast a model captures on this machine, files included."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tlcapture.captures.from_generation import capture_of
from tlcapture.commands.projecting.projections import ChanceLevels, project_capture
from tlcapture.commands.prompt_files.outputs import AddOns, Outputs, computed_add_ons, write_capture
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.samples import sampled
from tlcapture.generation.sampling.checkpoint_sampling import sampling_for
from tlcapture.models.loading import Model
from tlcapture.models.memory import fitting_batch_size
from tlcapture.names import Trait
from tlcapture.plan.cost import Pace, Workload
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import dtype_name
from tlcapture.traits.choice import ChosenVector
from tlcapture.traits.selection import Selection, fallback_layer
from tlcapture.traits.vectors import TraitVector

_BATCHES = 2  # timed, after one untimed batch


def measured_pace(model: Model, workload: Workload) -> Pace:
    """The pace of a workload, on prompts of random tokens whose captures go to a temporary folder.

    The first batch is not timed. Responses that stop early count with the tokens they have.
    """
    options = workload.options
    wanted = options.outputs(model.n_layers)
    n_tokens = workload.prompt_tokens + options.max_new_tokens
    hooks, prompt_tokens = wanted.live_hooks(model), workload.prompt_tokens
    size = options.batch_size or fitting_batch_size(model, n_tokens, workload.n_captures, hooks, prompt_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.d_vocab, ((_BATCHES + 1) * size, workload.prompt_tokens), generator=generator)
    each = [_prompt(number, row) for number, row in enumerate(ids.tolist())]
    prompts = sampled(each, options.samples)[: len(each)]  # as many rows
    chosen = _random_vectors(model, workload.n_projections, wanted)
    with TemporaryDirectory() as folder:
        layout = Layout(Path(folder), "plan")
        _capture(model, prompts[:size], size, workload, layout, chosen)
        start = time.perf_counter()
        n_new = _capture(model, prompts[size:], size, workload, layout, chosen)
        seconds = time.perf_counter() - start
    where = f"{model.device}, {dtype_name(model.dtype)}"
    return Pace(n_new / seconds, f"measured here on {len(prompts) - size} prompts in batches of {size}, {where}")


def _prompt(number: int, token_ids: Sequence[int]) -> TokenizedPrompt:
    return TokenizedPrompt(
        prompt_set="plan",
        id=str(number),
        source_text="",
        text="",
        token_ids=tuple(token_ids),
        system_prompt=None,
        chat_template=False,
    )


def _random_vectors(model: Model, count: int, wanted: Outputs) -> list[ChosenVector]:
    layer = min(wanted.kept.layers, key=lambda kept: abs(kept - fallback_layer(model.n_layers)))
    return [
        ChosenVector(
            TraitVector(
                Trait("plan", f"t{number}"), "residual", "probe", layer, "plan", torch.randn(model.d_model), {}
            ),
            Selection(layer, "probe", "override"),
            other_model_intended=True,
        )
        for number in range(count)
    ]


def _capture(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    size: int,
    workload: Workload,
    layout: Layout,
    chosen: Sequence[ChosenVector],
) -> int:
    """Capture prompts and write the workload's files; returns the number of new tokens."""
    options, run, n_new = workload.options, Run.silent(layout), 0
    levels = ChanceLevels(run)
    wanted, sampling = options.outputs(model.n_layers), sampling_for(options.sampling, model)
    for outcome in generate(
        model,
        prompts,
        hooks=wanted.live_hooks(model),
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        batch_size=size,
    ):
        if not isinstance(outcome, Generation):
            continue
        capture = capture_of(
            outcome,
            model,
            experiment=layout.experiment,
            sampling=sampling,
            max_new_tokens=options.max_new_tokens,
            attn_out=wanted.attn_out,
            save_dtype=options.save_dtype,
            kept=wanted.kept,
        )
        if wanted.raw:
            write_capture(layout, capture)
        if chosen:
            project_capture(run, capture, chosen, levels)
        asked = AddOns(wanted, outcome.cache, options.save_dtype, fresh=True)
        for write in computed_add_ons(layout, capture, model, asked):
            write()
        n_new += len(outcome.response_ids)
    return n_new
