"""The automatic batch size: a closed form of bytes, and the memory that batches were measured to take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.test_parity import as_prompt, random_ids
from tlcapture.generation.loop import generate
from tlcapture.generation.sampling.next_token import GREEDY
from tlcapture.models import memory
from tlcapture.models.loading import Model, from_hugging_face
from tlcapture.models.sizes import Measures
from tlcapture.views.attention import attention_hooks
from tlcapture.views.residual import residual_hooks

GIB = 2**30
RESIDUAL = [f"blocks.{layer}.{name}" for layer in range(26) for name in ("hook_resid_mid", "hook_resid_post")]


@pytest.fixture
def gemma2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shape of Gemma-2-2B in bfloat16 on a device of which so many bytes are free, with 128 GiB of main memory."""
    kind = type("Fake", (type(tiny.model("llama")),), {
        "measures": Measures(26, 2304, 8, 4, 256, 9216, 256_000),
        "most_prompt_positions": 2**14, "computes_scores": True,
    })  # fmt: skip
    model = object.__new__(kind)
    model.device, model.dtype = torch.device("cuda"), torch.bfloat16

    def with_free(device: int, main: int = 128 * GIB) -> Model:
        monkeypatch.setattr(memory, "free_memory", lambda of: device if of.type == "cuda" else main)
        monkeypatch.setattr(memory, "_MOST_ELSEWHERE", 10_000)
        return model

    return with_free


def keys_and_values(n_tokens: int) -> int:
    return 26 * 2 * 4 * 256 * 2 * n_tokens


@pytest.mark.parametrize("n_tokens", [1000, 4096, 16_384])
def test_it_grows_with_free_memory_by_one_prompt_for_its_keys_and_values(gemma2: Any, n_tokens: int) -> None:
    """Half of what is free, divided by what a prompt takes, for prompts of 100 tokens."""
    sizes = [
        memory.fitting_batch_size(gemma2(free * GIB, 2000 * GIB), n_tokens, 10**6, RESIDUAL, 100) for free in (40, 72)
    ]
    more = (sizes[1] - sizes[0]) * keys_and_values(n_tokens)
    assert more == pytest.approx(16 * GIB, rel=0.1, abs=keys_and_values(n_tokens))


def test_long_contexts_fit_as_often_as_their_keys_and_values_do(gemma2: Any) -> None:
    """An H100 with the weights of Gemma-2-2B: once 55 at 1,000 tokens, and 1 at 16,384."""
    free = 73 * GIB
    for n_tokens, at_least in ((1000, 250), (16_384, 16)):
        found = memory.fitting_batch_size(gemma2(free), n_tokens, 10**6, RESIDUAL, 100)
        assert found >= at_least
        assert found * keys_and_values(n_tokens) <= free / 2


def test_activations_that_do_not_stay_on_the_device_have_to_fit_in_main_memory(gemma2: Any) -> None:
    n_tokens, recorded = 4096, 52 * 2304 * 2 * 4096
    plenty = memory.fitting_batch_size(gemma2(73 * GIB, 2000 * GIB), n_tokens, 10**6, RESIDUAL, 100)
    assert plenty * recorded > 36 * GIB  # so they are copied every step
    scarce = memory.fitting_batch_size(gemma2(73 * GIB, 64 * GIB), n_tokens, 10**6, RESIDUAL, 100)
    # As many as main memory holds, or as the recorder keeps on the device.
    assert scarce < plenty
    assert scarce >= 32 * GIB // recorded
    nothing = memory.fitting_batch_size(gemma2(73 * GIB, 1 * GIB), n_tokens, 10**6, [], 100)
    assert nothing >= plenty


def test_patterns_are_charged_to_main_memory(gemma2: Any) -> None:
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(26)]
    n_tokens = 2000
    each = 26 * 8 * 2 * n_tokens**2 * 2
    found = memory.fitting_batch_size(gemma2(1000 * GIB, 128 * GIB), n_tokens, 10**6, patterns, 100)
    assert found == 64 * GIB // each


def test_one_prompt_always_runs_and_never_more_than_there_are(gemma2: Any) -> None:
    assert memory.fitting_batch_size(gemma2(0), 1000, 5, RESIDUAL) == 1
    assert memory.fitting_batch_size(gemma2(73 * GIB), 1000, 5, RESIDUAL) == 5


def wide_model() -> Model:
    """Large enough that what it computes outweighs everything else."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    return from_hugging_face(hf, tiny.tokenizer(), name="wide", engine=tiny.ENGINES[0])


def peak_bytes(run: Any) -> int:
    """The most bytes of tensors at one time, over those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    total, peak = 0, 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        total += each.nbytes()
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize(
    ("n_prompt", "n_new", "n_prompts", "with_patterns"), [(20, 60, 6, False), (300, 20, 6, False), (200, 8, 4, True)]
)
def test_measured_batches_take_what_is_predicted(
    n_prompt: int, n_new: int, n_prompts: int, with_patterns: bool
) -> None:
    model = wide_model()
    hooks = residual_hooks(model.n_layers, model.hook_names)
    hooks += attention_hooks(model.n_layers, model.hook_names) if with_patterns else []
    prompts = [as_prompt(random_ids(n_prompt, seed=seed), str(seed)) for seed in range(n_prompts)]

    def run() -> None:
        for _ in generate(model, prompts, hooks=hooks, max_new_tokens=n_new, sampling=GREEDY, batch_size=n_prompts):
            pass

    needed = memory.batch_bytes(model, n_prompt + n_new, hooks, n_prompt)
    predicted = needed.on_device(n_prompts) + n_prompts * (needed.recorded + needed.patterns)
    assert 0.3 * predicted < peak_bytes(run) < 1.2 * predicted
