"""What spans cost: a capture of 10 prompts with 50 tokens each, with them and without.

    OMP_NUM_THREADS=1 python benchmarks/span_cost.py --rounds 9

The order alternates; the ratio is the median of those of each round, in processor time and on the clock. Spans are left
out by replacing the functions that find them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

from measure import clocked

from tlcapture.captures.from_generation import capture_of
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import load_model
from tlcapture.prompts import tokenization
from tlcapture.prompts.prompt_sets import read_prompt_file
from tlcapture.prompts.tokenization import token_texts, tokenize
from tlcapture.storage.experiments.datasets import shipped_datasets
from tlcapture.views.residual import residual_hooks

N_NEW = 50


def main() -> None:
    """Print the ratio of both, and what spans take alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    model = load_model("smollm2", device="cpu")
    prompts = read_prompt_file(shipped_datasets() / "inference" / "single_trait.json").prompts[:10]

    def without() -> None:
        with _without_spans():
            _run(model, prompts)

    found = clocked({"without spans": without, "with spans": lambda: _run(model, prompts)}, rounds)
    print(found.line("with spans", "without spans"))
    alone = _seconds_alone(model, prompts)
    share = alone / median(found.processor["without spans"])
    print(f"finding the spans of prompts and responses alone: {alone * 1000:.1f} ms, {share:.2%}")


def _run(model: Any, prompts: Any) -> None:
    tokenized = [_tokenized(model, prompt) for prompt in prompts]
    hooks, greedy = residual_hooks(model.n_layers, model.hook_names, attn_out=False), Sampling(temperature=0)
    for outcome in generate(model, tokenized, hooks=hooks, max_new_tokens=N_NEW, sampling=greedy):
        assert isinstance(outcome, Generation)
        capture_of(
            outcome, model, experiment="bench", sampling=greedy, max_new_tokens=N_NEW, attn_out=False, save_dtype="auto"
        )


def _tokenized(model: Any, prompt: Any) -> Any:
    return tokenize(model.tokenizer, prompt.text, prompt_set="bench", prompt_id=prompt.id)


@contextmanager
def _without_spans() -> Iterator[None]:
    with (
        patch.object(tokenization, "_spans", lambda *given: []),
        patch.object(tokenization, "thinks", lambda *given: False),
        patch.object(tokenization, "_with_offsets", lambda tokenizer, text: (_ids(tokenizer, text), None)),
        patch("tlcapture.captures.from_generation.response_spans", lambda *given, **options: ([], None)),
    ):
        yield


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _seconds_alone(model: Any, prompts: Any) -> float:
    """The seconds that tokenising with spans takes more than without, and those for the spans of responses."""
    from tlcapture.prompts.thinking import response_spans

    ids, times = list(range(1000, 1000 + N_NEW)), []
    for _ in range(20):
        start = time.perf_counter()
        found = [_tokenized(model, prompt) for prompt in prompts]
        middle = time.perf_counter()
        with _without_spans():
            for prompt in prompts:
                _tokenized(model, prompt)
        end = time.perf_counter()
        for each in found:
            tokens = token_texts(model.tokenizer, ids)
            response_spans(model.tokenizer, each.opening, ids, tokens, len(each.token_ids), stopped=False)
        times.append((middle - start) - (end - middle) + (time.perf_counter() - end))
    return median(times)


if __name__ == "__main__":
    main()
