"""What interventions cost: a capture of 10 prompts with 50 tokens each, steered, capped, and unchanged.

    OMP_NUM_THREADS=1 python benchmarks/intervention_cost.py --rounds 9

The order alternates; ratios are the medians of those of each round, in processor time and on the clock. The coefficient
is 0 and the cap out of reach, so that all runs write the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import clocked

from tlcapture.captures.from_generation import capture_of
from tlcapture.generation.interventions.intervention import Add, Intervention, Limit
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import load_model
from tlcapture.prompts.prompt_sets import read_prompt_file
from tlcapture.prompts.tokenization import tokenize
from tlcapture.storage.experiments.datasets import shipped_datasets
from tlcapture.views.residual import residual_hooks

N_NEW = 50


def main() -> None:
    """Print the ratio of each to the unchanged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto")
    chosen = parser.parse_args()
    model = load_model("smollm2", device=chosen.device, engine=chosen.engine)
    prompts = read_prompt_file(shipped_datasets() / "inference" / "single_trait.json").prompts[:10]
    tokenized = [tokenize(model.tokenizer, each.text, prompt_set="bench", prompt_id=each.id) for each in prompts]
    cases = _cases(model.n_layers, model.d_model)
    works = {name: partial(_run, model, tokenized, changes) for name, changes in cases.items()}
    found = clocked(works, chosen.rounds)
    for name in cases:
        if name != "unchanged":
            print(found.line(name, "unchanged"))


def _cases(n_layers: int, d_model: int) -> dict[str, Sequence[Intervention]]:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0)
    return {
        "unchanged": [],
        "steered at one layer": [Add(layer=n_layers // 2, addend=0 * unit)],
        "capped at every layer, at 1e9": [Limit(layer=layer, direction=unit, most=1e9) for layer in range(n_layers)],
    }


def _run(model: Any, prompts: Any, interventions: Sequence[Intervention]) -> None:
    hooks, greedy = residual_hooks(model.n_layers, model.hook_names, attn_out=False), Sampling(temperature=0)
    options: Any = {"max_new_tokens": N_NEW, "sampling": greedy, "interventions": interventions}
    for outcome in generate(model, prompts, hooks=hooks, **options):
        assert isinstance(outcome, Generation)
        capture_of(
            outcome, model, experiment="bench", sampling=greedy, max_new_tokens=N_NEW, attn_out=False, save_dtype="auto"
        )


if __name__ == "__main__":
    main()
