"""`tlcapture plan`: bytes against closed forms and against files written; time; what fits a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests import tiny
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.errors import InputError
from tlcapture.models.checkpoints.checkpoint import count_parameters
from tlcapture.models.sizes import Measures
from tlcapture.plan.accelerators import ACCELERATORS, Accelerator
from tlcapture.plan.cost import Workload, bound_pace, cost_of
from tlcapture.plan.memory import Memory, memory_of
from tlcapture.plan.reductions import Change, reductions
from tlcapture.text import format_bytes, parse_bytes

Run = Callable[..., Result]
SIZE = ("--prompts", 100, "--prompt-tokens", 20, "--new-tokens", 10)


@pytest.fixture
def plan(tlcapture: Run, tiny_folder: Path) -> Callable[..., Any]:
    def run(*words: object) -> Any:
        done = tlcapture("plan", "--model", tiny_folder, "--json", *words)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def test_tensors_are_counted_to_the_byte(plan: Callable[..., Any]) -> None:
    """Twice the prompts make twice the bytes; one more layer of a point adds one row per token."""
    said = [
        plan(*SIZE, "--save-dtype", "float32", "--layers", layers, "--points", "residual_out")
        for layers in ("0", "0,2")
    ]
    assert plan("--prompts", 200, *SIZE[2:])["bytes"] == 2 * plan(*SIZE)["bytes"]
    rows = said[1]["bytes_per_prompt"] - said[0]["bytes_per_prompt"]
    assert rows == pytest.approx(30 * tiny.D_MODEL * 4 + 2 * 90, abs=1)  # the entries of two more tensors in a file


def test_the_estimate_is_close_to_what_is_written(
    plan: Callable[..., Any], capture: Run, extract: Run, data: Path
) -> None:
    extract()
    written = json.loads(capture("--attention", "--logit-lens", "--json", "--prompt", "x" * 20, prompts=()).stdout)
    projected = json.loads((data / "experiments/exp/inference/tone/loud/residual_stream/adhoc/1.json").read_bytes())
    words = ("--prompts", 1, "--prompt-tokens", projected["prompt"]["n_tokens"], "--new-tokens", 6, "--traits", 2)
    said = plan(*words, "--views", "residual,attention,logit_lens,projections")
    assert said["files"] == written["files"]["count"]
    assert said["bytes"] == pytest.approx(written["files"]["bytes"], rel=0.25)


def test_time_is_new_tokens_over_tokens_per_second_and_workers(plan: Callable[..., Any]) -> None:
    said = plan(*SIZE, "--tokens-per-second", 4, "--workers", 5)
    assert said["new_tokens"] == 1000
    assert said["worker_hours"] == pytest.approx(250 / 3600)
    assert said["hours"] == pytest.approx(50 / 3600)
    assert "hours" not in plan(*SIZE)


@pytest.mark.parametrize("views", ["residual", "projections,attention,logit_lens"])
def test_a_measured_pace_includes_writing_and_leaves_no_files(views: str, plan: Callable[..., Any], root: Path) -> None:
    words = ("--prompts", 4, "--prompt-tokens", 10, "--new-tokens", 4, "--batch-size", 2, "--traits", 2)
    said = plan(*words, "--views", views, "--measure")
    assert said["pace"].startswith("measured here on 4 prompts in batches of 2")
    assert said["tokens_per_second"] > 0
    assert list(root.iterdir()) == []


MEASURES = Measures(n_layers=2, d_model=8, n_heads=2, n_key_value_heads=1, d_head=4, d_mlp=16, d_vocab=50)


ONE = Workload(1, 100, CaptureOptions(max_new_tokens=50))


def pace(
    accelerator: Accelerator,
    *,
    batch_size: int,
    efficiency: float = 1.0,
    n_parameters: int = 10**9,
    workload: Workload = ONE,
) -> float:
    return bound_pace(
        "x", accelerator, MEASURES, n_parameters=n_parameters, bytes_per_weight=2, workload=workload,
        batch_size=batch_size, efficiency=efficiency,
    ).tokens_per_second  # fmt: skip


def test_decoding_is_bound_by_reading_the_weights_and_prefill_by_operations() -> None:
    """A device that reads 2 GB per second needs one second per step of a model of 2 GB, if operations are free."""
    slow = Accelerator(bandwidth=2e9, flops=1e30)
    assert pace(slow, batch_size=1) == pytest.approx(50 / 51, rel=1e-3)
    assert pace(slow, batch_size=10) == pytest.approx(10 * 50 / 51, rel=1e-3)
    assert pace(slow, batch_size=1, efficiency=0.5) == pytest.approx(0.5 * 50 / 51, rel=1e-3)
    # 2 operations per weight and token, on 100 + 50 tokens, at one token per second.
    busy = Accelerator(bandwidth=1e30, flops=2e9)
    assert pace(busy, batch_size=1) == pytest.approx(50 / 150, rel=1e-3)


def test_no_device_is_faster_than_calling_its_operations() -> None:
    free = Accelerator(bandwidth=1e30, flops=1e30)
    assert pace(free, batch_size=1) == pace(free, batch_size=1, efficiency=0.1) < 50_000


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_weights_are_counted_from_the_config_alone(name: str) -> None:
    model = tiny.hf_model(name)
    assert count_parameters(model.config) == sum(weight.numel() for weight in model.parameters())


def test_every_accelerator_gives_a_time(plan: Callable[..., Any]) -> None:
    paces = {name: plan(*SIZE, "--gpu", name)["tokens_per_second"] for name in ("t4", "h200")}
    assert 0 < paces["t4"] <= paces["h200"]
    assert all(each.bandwidth > 1e11 and each.flops > 1e13 for each in ACCELERATORS.values())


@pytest.mark.parametrize("budget", ["3MB", "1MB", "400KB", "1"])
def test_reductions_that_are_reported_to_fit_a_budget_do(plan: Callable[..., Any], budget: str) -> None:
    views = "residual,attention,logit_lens,internals:1,projections"
    said = plan(*SIZE, "--views", views, "--traits", 1, "--save-dtype", "float32", "--budget", budget)
    assert said["budget"] == parse_bytes(budget) < said["bytes"]
    assert said["reductions"]
    for each in said["reductions"]:
        left = views
        words = []
        for piece in each["options"].split(", "):
            if piece.startswith("without --"):
                gone = piece.removeprefix("without --").replace("-", "_").replace("layer_internals", "internals:1")
                left = ",".join(view for view in left.split(",") if view != gone)
            elif piece == "--projections-only":
                left = ",".join(view for view in left.split(",") if view not in ("residual", "internals:1"))
            else:
                words += piece.split()
        dtype = [] if "--save-dtype" in words else ["--save-dtype", "float32"]
        again = plan(*SIZE, "--views", left, "--traits", 1, *dtype, *words)
        assert again["bytes"] == each["bytes"] < said["bytes"]
        assert each["fits"] == (again["bytes"] <= said["budget"])


def test_reductions_name_the_options_that_change_and_the_share_that_is_left() -> None:
    options = CaptureOptions(attention=True, internals=(1,), save_dtype="float32", max_new_tokens=50)
    workload = Workload(10, 100, options, n_projections=3)
    before = cost_of(workload, MEASURES).n_bytes
    found = reductions(workload, MEASURES, budget=1)
    for each in found:
        changed = replace(options, **{change.option: change.value for change in each.changes})
        assert each.n_bytes == cost_of(replace(workload, options=changed), MEASURES).n_bytes
        assert each.factor == pytest.approx(each.n_bytes / before)
        assert 0 < each.factor < 1
    everything = (Change("internals", ()), Change("attention", False), Change("projections_only", True))
    assert everything in [each.changes for each in found]


def test_a_sufficient_budget_needs_no_reduction(tlcapture: Run, tiny_folder: Path) -> None:
    done = tlcapture("plan", "--model", tiny_folder, *SIZE, "--budget", "1TB")
    assert done.output.rstrip().endswith("budget 1.0 TiB: it fits")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--views", "residual,nix"), "'nix' is not a view: choose from residual, attn_out"),
        (("--views", "attention"), "a capture keeps residual, projections or both"),
        (("--views", "residual,attention:3"), "'attention:3' is not a view"),
        (("--budget", "lots"), "'lots' is not a size: expected a number and a unit, for example 500GiB"),
        (("--gpu", "h100", "--measure"), "give one of --tokens-per-second, --measure and --gpu"),
        (("--layers", "3"), "--layers 3: the model has layers 0 to 2"),
        (("--views", "residual,internals:9"), "--layer-internals 9: the model has layers 0 to 2"),
        (("--model", "nowhere/nothing"), "neither a folder nor in the hub cache"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(
    tlcapture: Run, tiny_folder: Path, words: tuple[str, ...], said: str
) -> None:
    done = tlcapture("plan", "--model", tiny_folder, *SIZE, *words)
    assert done.exit_code == 2
    assert said in done.output


def test_sizes_are_parsed_as_they_are_formatted() -> None:
    for text in ("0 B", "17 B", "1.5 KiB", "500.0 GiB", "2.0 TiB"):
        assert format_bytes(parse_bytes(text)) == text
    assert parse_bytes("500gib") == parse_bytes("500 GB") == 500 * 2**30
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes("-3 GB")


def test_samples_read_their_prompt_once_and_are_generated_each() -> None:
    """At one token per second: 100 tokens of the prompt, and 50 of each of 4 samples."""
    workload = Workload(3, 100, CaptureOptions(max_new_tokens=50, samples=4))
    assert (workload.n_captures, workload.n_new_tokens) == (12, 600)
    busy = Accelerator(bandwidth=1e30, flops=2e9)
    assert pace(busy, batch_size=4, workload=workload) == pytest.approx(4 * 50 / (100 + 4 * 50), rel=1e-3)
    assert pace(busy, batch_size=2, workload=workload) == pytest.approx(2 * 50 / (100 + 2 * 50), rel=1e-3)


def test_a_step_reads_keys_and_values_of_the_mean_context() -> None:
    """Two layers with a key and a value of 4 numbers of 2 bytes, for the prompt and half of the response."""
    kept = 2 * 2 * 4 * 2 * (100 + 50 / 2)
    assert pace(Accelerator(kept, 1e30), batch_size=3, n_parameters=0) == pytest.approx(3 * 50 / (50 * 3), rel=1e-3)


def test_the_memory_of_a_prompt_grows_with_its_response_and_counts_reading_again_for_attention_alone() -> None:
    def memory(**options: Any) -> Memory:
        return memory_of(Workload(1, 100, CaptureOptions(**options)), MEASURES, torch.float32, "cpu")

    residual, longer = (memory(max_new_tokens=n_tokens) for n_tokens in (50, 90))
    assert longer.prompt > residual.prompt and residual.replayed is longer.replayed is None
    again, later = (memory(max_new_tokens=n_tokens, attention=True).replayed for n_tokens in (50, 90))
    assert again is not None and later is not None and later > again > 0
