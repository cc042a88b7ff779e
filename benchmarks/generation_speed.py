"""Workloads W1 to W4, `products` and `gpu`: generation with capture, compared with other implementations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import implementations
import torch
from implementations import Task
from measure import Row, in_turn, medians, ratios, seconds
from torch.nn import functional

from tlcapture.generation.outcomes import Generation
from tlcapture.models.checkpoints.embedded import embedded_folder
from tlcapture.models.engines.hooked import HookedModel
from tlcapture.models.loading import Model, from_hugging_face, load_model
from tlcapture.products import linear
from tlcapture.prompts.prompt_sets import read_prompt_set
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.views.residual import residual_hooks


@dataclass
class Bench:
    """The embedded model in tlcapture and Hugging Face, and the size of workloads, which `quick` reduces."""

    rounds: int
    quick: bool
    dtype: str = "float32"
    engine: str = "hooked"

    @cached_property
    def model(self) -> Model:
        return load_model("smollm2", engine=self.engine, device="cpu", dtype=self.dtype)

    @cached_property
    def reference(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=getattr(torch, self.dtype)).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(embedded_folder())

    @cached_property
    def prompts(self) -> list[TokenizedPrompt]:
        prompt_set = read_prompt_set(Datasets(Path()), "single_trait")
        return [
            tokenize(self.model.tokenizer, prompt.text, prompt_set=prompt_set.name, prompt_id=prompt.id)
            for prompt in prompt_set.prompts
        ]

    @property
    def new_tokens(self) -> int:
        return 20 if self.quick else 50

    def task(self, n_prompts: int, batch_size: int) -> Task:
        return Task(self.prompts[:n_prompts], self.new_tokens, batch_size)

    def against_hugging_face(self, task: Task) -> dict[str, Any]:
        return {
            "ours": lambda: implementations.ours(self.model, task),
            "with hidden states": lambda: implementations.hugging_face(self.reference, task, hidden_states=True),
            "plain": lambda: implementations.hugging_face(self.reference, task, hidden_states=False),
        }


def w1(bench: Bench) -> Iterator[Row]:
    """Ten prompts in one batch."""
    task = bench.task(10, 10)
    works = bench.against_hugging_face(task)
    if not bench.quick:
        works |= _other_tools(bench, task)
    _check_tokens(works)
    _check_hidden_states(bench)
    times = in_turn(works, bench.rounds)
    note = medians(times)
    yield Row("W1", "ours / HF with hidden states", ratios(times, "ours", "with hidden states"), 1.0, 1.0, note=note)
    yield Row("W1", "ours / HF plain", ratios(times, "ours", "plain"))
    for name in list(works)[3:]:
        yield Row("W1", f"ours / {name}", ratios(times, "ours", name))


def w1_half(bench: Bench) -> Iterator[Row]:
    """Ten prompts in one batch, in bfloat16."""
    half = Bench(bench.rounds, bench.quick, "bfloat16")
    # In 16 bits, implementations may generate different tokens, so all generate the maximum number.
    half.model.generation_config = half.reference.generation_config
    for config in (half.reference.config, half.reference.generation_config):
        config.eos_token_id = None
    task = half.task(10, 10)
    half.model.tokenizer.eos_token = half.model.tokenizer.chat_template = None
    times = in_turn(half.against_hugging_face(task), bench.rounds)
    figures = ratios(times, "ours", "with hidden states")
    yield Row("W1 bfloat16", "ours / HF with hidden states", figures, 1.1, 1.0, note=medians(times))
    yield Row("W1 bfloat16", "ours / HF plain", ratios(times, "ours", "plain"))


def w2(bench: Bench) -> Iterator[Row]:
    """One prompt."""
    works = bench.against_hugging_face(bench.task(1, 1))
    _check_tokens(works)
    times = in_turn(works, bench.rounds)
    figures = ratios(times, "ours", "with hidden states")
    yield Row("W2", "ours / HF with hidden states", figures, 1.05, 0.9, note=medians(times))
    yield Row("W2", "ours / HF plain", ratios(times, "ours", "plain"))


def w3(bench: Bench) -> Iterator[Row]:
    """64 prompts of 20 to 400 tokens of continuous text, in random order."""
    token_ids = [token for prompt in bench.prompts for token in prompt.token_ids]
    lengths = torch.linspace(20, 400, 16 if bench.quick else 64).int()
    lengths = lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))].tolist()
    text = token_ids * (2 * 400 // len(token_ids) + 2)
    prompts = [
        TokenizedPrompt("lengths", str(number), "", "", tuple(text[number : number + length]), None, False)
        for number, length in enumerate(lengths)
    ]
    new_tokens, sizes = 16, (8,) if bench.quick else (8, 16, 32)

    def theirs(size: int) -> Any:
        return lambda: implementations.hugging_face(
            bench.reference, Task(prompts, new_tokens, size), hidden_states=True
        )

    tried = {size: seconds(theirs(size)) for size in sizes}
    best = min(tried, key=tried.__getitem__)
    works = {"ours": lambda: implementations.ours(bench.model, Task(prompts, new_tokens, 16)), "theirs": theirs(best)}
    _check_tokens(works)
    times = in_turn(works, bench.rounds)
    note = (
        f"{medians(times)}; {new_tokens} new tokens; HF in batches of {best}, the best of {', '.join(map(str, sizes))}"
    )
    yield Row("W3", "ours / HF with hidden states", ratios(times, "ours", "theirs"), 0.8, 0.6, note=note)


def w4(bench: Bench) -> Iterator[Row]:
    """One decode step after 1,000 tokens of context, compared with one after 100."""
    model = bench.model
    hooks = frozenset(residual_hooks(model.n_layers, model.hook_names))
    for batch_size, must, aim in ((1, 1.6, 1.3), (10, None, None)):

        def decode(context: int, batch_size: int = batch_size) -> Any:
            tokens = torch.randint(5, 1000, (batch_size, context), generator=torch.Generator().manual_seed(0))
            state = model.start(batch_size)
            model.step(tokens, torch.ones_like(tokens), state, hooks, want_logits=False)

            def run() -> None:
                one = torch.ones(batch_size, 1, dtype=torch.long)
                for _ in range(10):
                    model.step(one, one, state, hooks, want_logits=True)

            return run

        times = in_turn({"at 1000": decode(1000), "at 100": decode(100)}, bench.rounds)
        figures = ratios(times, "at 1000", "at 100")
        note = f"10 tokens: {medians(times, milli=True)}"
        yield Row(f"W4, batch {batch_size}", "a token at 1,000 of context / at 100", figures, must, aim, note=note)


def products(bench: Bench) -> Iterator[Row]:
    """Products as computed by `fast`, compared with `functional.linear`."""
    assert isinstance(bench.model, HookedModel)
    hooked = bench.model.tl
    gates = [block.mlp.W_gate.T for block in hooked.blocks]
    unembedding = [hooked.unembed.W_U.T]
    cases = [("MLP gates of all layers", gates, rows) for rows in (1, 2, 4, 10, 32, 400)]
    cases += [("unembedding", unembedding, rows) for rows in (1, 10, 64)]
    for what, weights, rows in cases:
        x = torch.randn(rows, bench.model.d_model)
        works = {
            "ours": lambda x=x, weights=weights: [linear(x, weight) for weight in weights],
            "linear": lambda x=x, weights=weights: [functional.linear(x, weight) for weight in weights],
        }
        with torch.no_grad():
            times = in_turn(works, 4 * bench.rounds)
        label = f"{what}, {rows} row{'s' * (rows > 1)}: ours / functional.linear"
        yield Row("products", label, ratios(times, "ours", "linear"), 1.2, 1.05, note=medians(times, milli=True))


def accelerator(bench: Bench) -> Iterator[Row]:
    """A model of random weights with the shape of Gemma-2-2B in bfloat16 on the GPU; no rows without a GPU."""
    if not torch.cuda.is_available():
        return
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(architectures=["Gemma2ForCausalLM"], eos_token_id=None)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda").eval()
    model = from_hugging_face(reference, bench.tokenizer, name="gemma-2-2b shape", engine="hooked", device="cuda")
    for batch_size in (1, 10, 64):
        prompts = [
            TokenizedPrompt("gpu", str(n), "", "", tuple(torch.randint(5, 9000, (100,)).tolist()), None, False)
            for n in range(batch_size)
        ]
        task = Task(prompts, 50, batch_size)
        works = {
            "ours": lambda task=task: implementations.ours(model, task),
            "plain": lambda task=task: implementations.hugging_face(reference, task, hidden_states=False),
        }
        times = in_turn(works, bench.rounds)
        tokens = batch_size * task.new_tokens
        floor = task.new_tokens * sum(p.numel() * p.itemsize for p in reference.parameters()) / _bandwidth()
        speeds = ", ".join(
            f"{name} {tokens / sorted(each)[len(each) // 2]:.0f} tokens/s" for name, each in times.items()
        )
        note = f"{speeds}; floor of reading the weights {tokens / floor:.0f} tokens/s"
        yield Row(f"GPU, batch {batch_size}", "ours / HF plain", ratios(times, "ours", "plain"), note=note)


def _bandwidth() -> float:
    """The bandwidth of copies on the GPU in bytes per second, reads and writes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * source.numel() / min(in_turn({"copy": copy}, 10)["copy"])


def _other_tools(bench: Bench, task: Task) -> dict[str, Any]:
    from nnsight import TransformersModel

    wrapped = TransformersModel(bench.reference, tokenizer=bench.model.tokenizer, task="text-generation")
    hooked = load_model("smollm2", engine="hooked", device="cpu", dtype=bench.dtype, fast=False).tl
    for parameter in hooked.parameters():  # the layout in which TransformerLens loads them
        parameter.data = parameter.data.contiguous()
    stops = implementations.own_stops(bench.model)
    return {
        "nnsight": lambda: implementations.nnsight(wrapped, task),
        "TransformerLens loop": lambda: implementations.transformer_lens(hooked, task, stops),
    }


def _check_tokens(works: dict[str, Any]) -> None:
    found = {name: work() for name, work in works.items()}
    for name, tokens in found.items():
        if tokens != found["ours"]:
            raise SystemExit(f"{name} generated different greedy tokens from ours, so the comparison is invalid")


def _check_hidden_states(bench: Bench) -> None:
    """Exit unless our residual stream equals the hidden states from each step of Hugging Face's `generate`."""
    from tlcapture.generation.loop import generate
    from tlcapture.generation.sampling.next_token import Sampling

    prompt = bench.prompts[0]
    hooks = residual_hooks(bench.model.n_layers, bench.model.hook_names)
    greedy = Sampling(temperature=0)
    (found,) = generate(bench.model, [prompt], hooks=hooks, max_new_tokens=10, sampling=greedy)
    assert isinstance(found, Generation)
    output = bench.reference.generate(
        torch.tensor([prompt.token_ids]),
        attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    for layer in range(bench.model.n_layers - 1):
        theirs = torch.cat([step[layer + 1][0] for step in output.hidden_states])
        mine = found.cache[f"blocks.{layer}.hook_resid_post"][: len(theirs)]
        if (mine - theirs).abs().max() > 1e-4 * theirs.abs().max():
            raise SystemExit(f"our residual stream after layer {layer} differs from that of Hugging Face")
