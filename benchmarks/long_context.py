"""Whether the time of a token stays flat over 4,096 new tokens, all residual points captured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from generation_speed import Bench
from measure import Row
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tlcapture.generation.loop import generate
from tlcapture.generation.sampling.next_token import GREEDY
from tlcapture.models.checkpoints.embedded import embedded_folder
from tlcapture.models.loading import from_hugging_face
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.residual import residual_hooks

_NEW = 4096


def flat(bench: Bench) -> Iterator[Row]:
    """The last quarter of 4,096 new tokens / the first, by the median time of a token on a tiny model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=2 * _NEW, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    model = from_hugging_face(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")
    prompt = TokenizedPrompt("bench", "1", "", "", tuple(range(100, 108)), None, chat_template=False)
    hooks = residual_hooks(model.n_layers, model.hook_names)
    figures, notes = [], []
    for _ in range(1 if bench.quick else bench.rounds):
        times: list[float] = []
        run = generate(
            model, [prompt], hooks=hooks, max_new_tokens=_NEW, sampling=GREEDY,
            on_tokens=lambda count, times=times: times.append(time.perf_counter()),  # type: ignore[misc]
        )  # fmt: skip
        list(run)
        steps = [after - before for before, after in pairwise(times)]
        first, last = statistics.median(steps[64 : _NEW // 4]), statistics.median(steps[-_NEW // 4 :])
        figures.append(last / first)
        notes.append(f"{1000 * last:.2f} ms, {1000 * first:.2f} ms")
    yield Row("flat", "last quarter of 4,096 new tokens / first, all points captured", figures, 1.5, 1.2, note=notes[0])
