"""Workloads at temperature 0.7, rules and samples, and W1 on the engine `bridge`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from generation_speed import Bench
from implementations import Task, hugging_face
from measure import Row, in_turn, medians, ratios, run_child, seconds
from torch import Tensor

from tlcapture.generation.loop import generate, prefill
from tlcapture.generation.samples import sampled
from tlcapture.generation.sampling.next_token import Sampling, choose_tokens, n_numbers
from tlcapture.generation.sampling.noise import GumbelNoise
from tlcapture.generation.sampling.processors import LogitProcessors, PromptTokens
from tlcapture.models.loading import from_hugging_face
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.residual import residual_hooks

TEMPERATURE = 0.7
TL4 = Path(__file__).parents[1] / ".venv-tl4/bin/python"


def w1_sampled(bench: Bench) -> Iterator[Row]:
    """Ten prompts in one batch at temperature 0.7, without stop tokens, so that all responses are equally long.

    Hugging Face draws from the whole softmax as well; by default, `generate` draws from the 50 likeliest tokens.
    """
    own = Bench(bench.rounds, bench.quick)
    own.model.generation_config = own.reference.generation_config
    for config in (own.reference.config, own.reference.generation_config):
        config.eos_token_id = None
    task = Task(own.prompts[:10], own.new_tokens, 10, temperature=TEMPERATURE)
    own.model.tokenizer.eos_token = own.model.tokenizer.chat_template = None
    by_default = replace(task, top_k=50)
    works = own.against_hugging_face(task)
    works["top_k 50"] = lambda: hugging_face(own.reference, by_default, hidden_states=False)
    times = in_turn(works, bench.rounds)
    note = medians(times)
    yield Row("W1 sampled", "ours / HF with hidden states", ratios(times, "ours", "with hidden states"), note=note)
    yield Row("W1 sampled", "ours / HF sampling", ratios(times, "ours", "plain"), 0.55, 0.55)
    yield Row("W1 sampled", "ours / HF sampling of the 50 likeliest, its default", ratios(times, "ours", "top_k 50"))


def large_vocabulary(bench: Bench) -> Iterator[Row]:
    """A model of random weights of width 512 with a vocabulary of 200,000, at 32 rows, without capture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8
    )
    config.eos_token_id = None
    reference = LlamaForCausalLM(config).eval()
    model = from_hugging_face(reference, bench.tokenizer, name="large vocabulary", engine="hooked", device="cpu")
    prompts = [
        TokenizedPrompt("large", str(n), "", "", tuple(torch.randint(5, 9000, (10,)).tolist()), None, False)
        for n in range(32)
    ]

    def run(temperature: float) -> Any:
        sampling = Sampling(temperature)
        return lambda: list(
            generate(model, prompts, hooks=[], max_new_tokens=bench.new_tokens, sampling=sampling, batch_size=32)
        )

    times = in_turn({"greedy": run(0), "sampled": run(TEMPERATURE)}, bench.rounds)
    figures, note = ratios(times, "greedy", "sampled"), medians(times)
    yield Row("large vocabulary", "speed of sampling / of greedy", figures, 0.8, 0.9, at_least=True, note=note)


def sampling(bench: Bench) -> Iterator[Row]:
    """Choosing 64 tokens of a vocabulary of 256,000, beside the inverse distribution function that did it before."""
    n_rows, d_vocab = 64, 256_000
    logits = torch.randn(n_rows, d_vocab, generator=torch.Generator().manual_seed(0)) * 3
    generators = [torch.Generator().manual_seed(row) for row in range(n_rows)]
    noise = GumbelNoise(range(n_rows), n_numbers(d_vocab), 16, logits.device)
    works = {
        "now": lambda: choose_tokens(logits, TEMPERATURE, noise.next()).tokens.tolist(),
        "before": lambda: _by_inverse(logits, generators),
    }
    times = in_turn(works, 4 * bench.rounds)
    milliseconds = [1000 * each for each in times["now"]]
    note = medians(times, milli=True)
    yield Row("sampling", "64 x 256,000, now / before", ratios(times, "now", "before"), 0.2, 0.2, note=note)
    yield Row("sampling", "64 x 256,000, in ms", milliseconds, 120, 80)


def processors(bench: Bench) -> Iterator[Row]:
    """What each rule adds to choosing the next tokens of ten rows of the embedded model, beside `generate`'s classes.

    The logits are those of ten prompts, and a step is one of them with capture.
    """
    logits, step = _real_logits(bench)
    given: dict[str, tuple[dict[str, Any], Any]] = {
        "repetition penalty 1.2": ({"repetition_penalty": 1.2}, transformers.RepetitionPenaltyLogitsProcessor(1.2)),
        "top-k 50": ({"top_k": 50}, transformers.TopKLogitsWarper(50)),
        "top-p 0.9": ({"top_p": 0.9}, transformers.TopPLogitsWarper(0.9)),
        "min-p 0.05": ({"min_p": 0.05}, transformers.MinPLogitsWarper(0.05)),
    }
    ids = [list(prompt.token_ids) for prompt in bench.prompts[:10]]
    padded = torch.tensor([row[:1] * (max(map(len, ids)) - len(row)) + row for row in ids])
    tokens = [PromptTokens(row, frozenset(), 50) for row in ids]
    temperature = transformers.TemperatureLogitsWarper(TEMPERATURE)
    for name, (rules, theirs) in given.items():
        ours = LogitProcessors(Sampling(TEMPERATURE, **rules).rules, TEMPERATURE, tokens)
        is_before = "penalty" in name

        def by_generate(theirs: Any = theirs, is_before: bool = is_before) -> Tensor:
            return temperature(None, theirs(padded, logits)) if is_before else theirs(padded, temperature(None, logits))

        def by_ours(ours: Any = ours) -> Tensor:
            ours.append(padded[:, -1])
            return ours(logits)

        times = in_turn({"ours": by_ours, "generate": by_generate}, 8 * bench.rounds)
        yield Row(name, "ours / generate's processors", ratios(times, "ours", "generate"), 1.2, 1.0)
        yield Row(name, "share of a step of W1", [each / step for each in times["ours"]], 0.1, 0.05)


def _real_logits(bench: Bench) -> tuple[Tensor, float]:
    """The logits `[10, d_vocab]` after ten prompts, and the seconds of a step that follows."""
    model, prompts = bench.model, bench.prompts[:10]
    state = prefill(model, prompts)
    tokens = torch.tensor([[prompt.token_ids[-1]] for prompt in prompts])
    hooks = frozenset(residual_hooks(model.n_layers, model.hook_names, attn_out=False))
    logits = model.step(tokens, torch.ones_like(tokens), state, hooks, want_logits=True).logits
    assert logits is not None
    again = [
        seconds(lambda: model.step(tokens, torch.ones_like(tokens), state, hooks, want_logits=True)) for _ in range(9)
    ]
    return logits.float().clone(), sorted(again)[4]


def samples(bench: Bench) -> Iterator[Row]:
    """Eight samples of each of four long prompts, which are read once, beside as many prompts."""
    prompts = [replace(prompt, token_ids=prompt.token_ids * 12) for prompt in bench.prompts[:4]]
    several = [replace(prompt, id=f"{prompt.id}-{n}") for prompt in prompts for n in range(8)]
    hooks = residual_hooks(bench.model.n_layers, bench.model.hook_names, attn_out=False)

    def run(chosen: Sequence[TokenizedPrompt]) -> Any:
        options: dict[str, Any] = {
            "max_new_tokens": bench.new_tokens,
            "sampling": Sampling(TEMPERATURE),
            "batch_size": 32,
        }
        return lambda: list(generate(bench.model, chosen, hooks=hooks, **options))

    times = in_turn({"samples": run(sampled(prompts, 8)), "prompts": run(several)}, bench.rounds)
    yield Row("4 prompts, 8 samples", "samples / prompts of their own", ratios(times, "samples", "prompts"), 1.0, 0.8)


def _by_inverse(logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """The draws of commit ba751499: the distribution function in float64, inverted at a random number."""
    heights = logits.to("cpu", torch.float64)
    heights = heights - heights.amax(dim=-1, keepdim=True)
    heights = (heights / TEMPERATURE).softmax(dim=-1).cumsum(dim=-1)
    draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    tokens = torch.searchsorted(heights, draws * heights[:, -1:], right=True)
    return tokens[:, 0].clamp(max=logits.shape[-1] - 1).tolist()


def w1_bridge(bench: Bench) -> Iterator[Row]:
    """Ten prompts in one batch on the engine `bridge` of TransformerLens 4; no rows without its environment."""
    if not TL4.exists():
        return
    program = "\n".join(
        (
            f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]",
            "from generation_speed import Bench; from sampling_speed import bridge_times",
            f"bridge_times(Bench({bench.rounds}, {bench.quick}, engine='bridge'))",
        )
    )
    times = json.loads(run_child(("-c", program), python=TL4).splitlines()[-1])
    figures = ratios(times, "ours", "with hidden states")
    yield Row("W1 bridge", "ours / HF with hidden states", figures, 1.05, 1.0, note=medians(times))
    yield Row("W1 bridge", "ours / HF plain", ratios(times, "ours", "plain"))


def bridge_times(bench: Bench) -> None:
    """Print the seconds of each implementation as JSON."""
    works = bench.against_hugging_face(bench.task(10, 10))
    found = {name: work() for name, work in works.items()}
    if any(tokens != found["ours"] for tokens in found.values()):
        raise SystemExit("the implementations generated different greedy tokens, so the comparison is invalid")
    print(json.dumps(in_turn(works, bench.rounds)))


# What the rows of a workload that was not run would compare, and why it was not.
NOT_MEASURED = {"w1_bridge": ("W1 bridge", "ours / HF with hidden states", "no .venv-tl4 (make test-tl4 makes it)")}
