"""The content of a valid capture file, without a model."""

from __future__ import annotations

from typing import Any

import torch

N_LAYERS, WIDTH, N_PROMPT, N_RESPONSE = 3, 8, 4, 5


def part(n_tokens: int, *, n_layers: int = N_LAYERS, width: int = WIDTH, seed: int = 0) -> dict[str, Any]:
    """The prompt or response of a file, with activations that are views of one buffer, as in real files."""
    buffer = torch.randn(2 * n_layers + 1, n_tokens, width, generator=torch.Generator().manual_seed(seed))
    outputs = torch.randn(n_layers, n_tokens, width, generator=torch.Generator().manual_seed(seed + 1))
    names = ("residual_in", "after_attn", "residual_out")
    activations = {
        layer: {**{name: buffer[2 * layer + index] for index, name in enumerate(names)}, "attn_out": outputs[layer]}
        for layer in range(n_layers)
    }
    tokens = [f"t{number}" for number in range(n_tokens)]
    return {
        "text": "".join(tokens),
        "tokens": tokens,
        "token_ids": list(range(5, 5 + n_tokens)),
        "activations": activations,
    }


def content() -> dict[str, Any]:
    """The content of a file: capture 1 of the prompt set `odd`."""
    metadata = {
        "inference_model": "tiny",
        "inference_experiment": "exp",
        "prompt_set": "odd",
        "prompt_id": "1",
        "n_layers": N_LAYERS,
        "d_model": WIDTH,
        "temperature": 0.7,
        "model_fingerprint": "f",
    }
    prompt, response = part(N_PROMPT), part(N_RESPONSE, seed=7)
    return {"format_version": 1, "prompt": prompt, "response": response, "metadata": metadata}
