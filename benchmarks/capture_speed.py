"""Tokens per second of a capture beside Hugging Face's `generate`, in one run and in turn.

    python benchmarks/capture_speed.py [--rounds 5] [--prompts 10] [--new-tokens 50]

Both write the same greedy tokens of the embedded model in float32, which is checked. Rounds alternate
(A B A B ...); the table has medians, and the ratio of each round's times with its spread. The capture
keeps the residual stream of every layer and point; Hugging Face keeps its hidden states.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--prompts", "n_prompts", default=10, show_default=True, help="First prompts of single_trait.")
@click.option("--new-tokens", default=50, show_default=True)
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(10, 1), show_default=True)
def main(rounds: int, n_prompts: int, new_tokens: int, batch_sizes: tuple[int, ...]) -> None:
    """Measure and print a Markdown table."""
    import torch
    import transformers

    from tlcapture.chat import tokenize
    from tlcapture.embedded import embedded_folder
    from tlcapture.generation import Generation, Sampling, generate
    from tlcapture.layout import Datasets
    from tlcapture.models import load_model
    from tlcapture.prompts import read_prompt_set
    from tlcapture.views.residual import residual_hooks, residual_view

    model = load_model("smollm2", engine="hooked", device="cpu", dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()
    prompt_set = read_prompt_set(Datasets(Path()), "single_trait")
    prompts = [
        tokenize(model.tokenizer, prompt.text, prompt_set=prompt_set.name, prompt_id=prompt.id)
        for prompt in prompt_set.prompts[:n_prompts]
    ]
    hooks = residual_hooks(model.n_layers, model.hook_names)

    def ours(batch_size: int) -> dict[str, list[int]]:
        found = {}
        for outcome in generate(
            model,
            prompts,
            hooks=hooks,
            max_new_tokens=new_tokens,
            sampling=Sampling(temperature=0),
            batch_size=batch_size,
        ):
            assert isinstance(outcome, Generation)
            residual_view(outcome.cache, model.n_layers)
            found[outcome.prompt.id] = list(outcome.response_ids)
        return found

    def theirs(batch_size: int) -> dict[str, list[int]]:
        found = {}
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(len(prompt.token_ids) for prompt in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
                mask[row, width - len(prompt.token_ids) :] = 1
            output = reference.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
            for row, prompt in enumerate(batch):
                response = output.sequences[row, width:].tolist()
                end = next((n for n, i in enumerate(response) if i == reference.config.eos_token_id), len(response))
                found[prompt.id] = response[: end + 1]
        return found

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    click.echo(f"{len(prompts)} prompts, {new_tokens} new tokens, {torch.get_num_threads()} threads, {versions}\n")
    click.echo(
        "| batch | tlcapture, tokens/s | Hugging Face generate with hidden states, tokens/s | time ratio (spread) |"
    )
    click.echo("| --- | --- | --- | --- |")
    for batch_size in batch_sizes:
        assert ours(batch_size) == theirs(batch_size), "the greedy tokens differ"
        times = {ours: [], theirs: []}  # type: ignore[var-annotated]
        n_tokens = sum(map(len, ours(batch_size).values()))
        for _ in range(rounds):
            for rival in (ours, theirs):
                times[rival].append(_seconds(rival, batch_size))
        ratios = sorted(a / b for a, b in zip(times[ours], times[theirs], strict=True))
        speed = {rival: n_tokens / statistics.median(measured) for rival, measured in times.items()}
        click.echo(
            f"| {batch_size} | {speed[ours]:.1f} | {speed[theirs]:.1f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )


def _seconds(work: Callable[[int], object], batch_size: int) -> float:
    start = time.perf_counter()
    work(batch_size)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
