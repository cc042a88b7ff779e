"""What a prompt takes in memory is said before it runs, and a run that does not fit is refused before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import Result
from safetensors.numpy import load_file

from tests import tiny
from tlcapture.captures.capture import Capture
from tlcapture.commands.capturing import memory_need
from tlcapture.commands.capturing.memory_need import Sized
from tlcapture.commands.prompt_files import replay
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.commands.prompt_files.view_parts import ViewParts
from tlcapture.models.sizes import Measures
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import KeptTokens

Run = Callable[..., Result]
GREEDY = ("--temperature", 0)
N = 4096


@pytest.fixture(scope="module")
def gemma_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of Gemma-2 2B, without weights."""
    folder = tmp_path_factory.mktemp("gemma") / "gemma-2-2b-shape"
    transformers.Gemma2Config(dtype="bfloat16").save_pretrained(folder)
    return folder


def test_the_plan_of_gemma_at_4096_tokens_says_what_it_will_take(tlcapture: Run, gemma_shape: Path) -> None:
    config = transformers.Gemma2Config()
    words = ("plan", "--model", gemma_shape, "--prompts", 1, "--prompt-tokens", N - 50, "--new-tokens", 50, "--json")
    said = {
        form: json.loads(tlcapture(*words, "--views", "residual,attention", "--gpu", "h100", *form).stdout)
        for form in ((), ("--format", "json"), ("--attention-layers", "3"))
    }
    layer = config.num_attention_heads * N * (N + 1) // 2  # weights
    n_layers = config.num_hidden_layers
    attention = {form: each["views"]["attention"]["bytes"] for form, each in said.items()}
    assert attention[()] == pytest.approx(2 * n_layers * layer, rel=1e-3)
    assert attention["--format", "json"] == pytest.approx(9.5 * n_layers * layer, rel=1e-3)
    assert attention["--attention-layers", "3"] == pytest.approx(2 * layer, rel=1e-3)
    memory = {form: each["memory_per_prompt"] for form, each in said.items()}
    assert memory[()]["dtype"] == "bfloat16"
    at_once = (
        2 * n_layers * config.num_attention_heads * (N - 50) ** 2
    )  # the patterns of the pass that reads the prompt
    assert at_once < memory[()]["prompt"] < 1.7 * at_once
    assert memory[()]["replayed"] < memory[()]["prompt"] / 3
    assert memory["--attention-layers", "3"]["prompt"] < memory[()]["prompt"] / 2
    assert memory["--format", "json"]["prompt"] > memory[()]["prompt"] + attention["--format", "json"]
    shown = tlcapture(*words[:-1], "--views", "residual,attention", "--gpu", "h100").output
    assert "memory of one prompt at a time in bfloat16" in shown


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--format", "json")])
def test_a_run_that_cannot_fit_is_refused_before_it_begins(
    capture: Run, data: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(memory_need, "free_memory", lambda device: 10_000)
    done = capture(*GREEDY, "--attention", *words)
    assert "short/3: " in done.output, "the longest prompt"
    assert "tokens would take about" in done.output
    assert "9.8 KiB are free" in done.output
    assert ("leave out --format json" in done.output) == ("json" in words)
    assert done.exit_code == (0 if words == ("--dry-run",) else 2)
    assert not (data / "experiments").exists() or not list((data / "experiments").rglob("*.pt"))


def test_json_of_few_tokens_needs_memory_for_their_weights_alone(gemma_shape: Path) -> None:
    measures = Measures.of(transformers.AutoConfig.from_pretrained(gemma_shape))
    model = Sized(measures, torch.bfloat16, torch.device("cpu"))
    kept, parts = KeptPoints.of(measures.n_layers), ViewParts(form="json")
    few, every = (
        memory_need.memory_need(model, Outputs(kept, attention=True, parts=parts, tokens=tokens), 200, 300).main
        for tokens in (KeptTokens.parse("last"), None)
    )
    weights = measures.n_layers * measures.n_heads * (sum(range(1, 301)) - 300)
    assert every - few == 3 * 9.5 * weights


def test_the_captures_of_a_variant_and_given_responses_are_counted_as_they_are(
    capture: Run, extract: Run, tlcapture: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract()
    assert capture(*GREEDY, "--steer", "tone/loud:+0.5@1", "--variant", "v").exit_code == 0
    path = data / "experiments" / "exp" / "inference" / "raw" / "residual" / "short@v" / "3.pt"
    content = torch.load(path)
    content["metadata"]["max_new_tokens"] = 500  # as of a response that ended early
    torch.save(content, path)
    refused = f"{len(Capture.open(path).token_ids)} tokens would take about"
    monkeypatch.setattr(memory_need, "free_memory", lambda device: 10_000)
    replayed = capture("--replay", "--attention", "--variant", "v")
    assert f"short@v/3: {refused}" in replayed.output
    given = tlcapture("capture", "--experiment", "exp", "--responses-from", "exp/short@v", "--variant", "w")
    assert f"short@w/3: {refused}" in given.output


def test_a_capture_too_large_for_one_pass_is_read_in_several(
    capture: Run, data: Path, analysis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights of one pass, whatever passes read them; internals too."""
    words = ("--attention", "--layer-internals", 1, "--format", "compact")
    capture(*GREEDY, "--save-dtype", "float32")
    assert capture("--replay", *words).exit_code == 0
    expected = {path.name: load_file(path) for path in analysis.glob("*_attention.safetensors")}
    hooks: list[int] = []
    generate = replay.generate
    monkeypatch.setattr(replay, "generate", lambda *of, **how: hooks.append(len(how["hooks"])) or generate(*of, **how))
    monkeypatch.setattr(replay, "free_memory", lambda device: 1)
    assert capture("--replay", *words).exit_code == 0
    assert len(hooks) == 3 * tiny.N_LAYERS
    for name, tensors in expected.items():
        for key, found in load_file(analysis / name).items():  # alone rather than in a batch: rounded otherwise
            np.testing.assert_allclose(found, tensors[key], rtol=2e-3, atol=1e-6)
