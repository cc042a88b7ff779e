"""Writes the vector files in this folder with the tools that they are of, and what they must be read as.

    pip install --no-deps --target TOOLS repeng==0.4.0 steering-vectors==0.12.2
    PYTHONPATH=TOOLS:. python -m tests.other_tools.write

The model is the tiny Llama of `tests/tiny.py`. Every vector is the difference between two texts of an activation at the
last token. Each tool reads it in its own way; `expected.safetensors` holds it as in Hugging Face's `hidden_states`, and
as hooks on its blocks and attention modules see it. persona-vectors is not a package: its file is written as its
`generate_vec.py` does, by stacking the mean differences of all hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests import tiny

HERE = Path(__file__).parent
LOUD, SOFT = "say it LOUD", "say it soft"


def differences(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Differences at the last token: of `hidden_states` `[n_layers + 1, d]` and of module outputs `[n_layers, d]`."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    for text in (LOUD, SOFT):
        seen = found[text] = {"blocks": [], "attn_out": []}
        handles = []
        for layer in model.model.layers:
            handles.append(layer.register_forward_hook(lambda *call, to=seen["blocks"]: to.append(_last(call[2]))))
            handles.append(
                layer.self_attn.register_forward_hook(lambda *call, to=seen["attn_out"]: to.append(_last(call[2])))
            )
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        seen["hidden_states"] = [_last(state) for state in states]
        for handle in handles:
            handle.remove()
    return {name: torch.stack(found[LOUD][name]) - torch.stack(found[SOFT][name]) for name in found[LOUD]}


def _last(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output)[0, -1].clone()


@torch.no_grad()
def main() -> None:
    np.float_ = np.float64  # a name that repeng 0.4.0 uses and NumPy 2 has no more
    from repeng import ControlVector
    from repeng.extract import batched_get_hiddens
    from steering_vectors import train_steering_vector

    model, tokenizer = tiny.hf_model("llama"), tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    found = differences(model, tokenizer)
    save_file({name: value.contiguous() for name, value in found.items()}, HERE / "expected.safetensors")

    torch.save(found["hidden_states"], HERE / "loud_response_avg_diff.pt")

    layers = list(range(tiny.N_LAYERS))
    read = batched_get_hiddens(model, tokenizer, [LOUD, SOFT], layers, batch_size=1)
    directions = {layer: read[layer][0] - read[layer][1] for layer in layers}
    ControlVector(model.config.model_type, directions).export_gguf(HERE / "repeng.gguf")

    for kind in ("decoder_block", "self_attn", "mlp"):
        vector = train_steering_vector(model, tokenizer, [(LOUD, SOFT)], layer_type=kind, read_token_index=-1)
        torch.save(vector, HERE / f"steering_vectors_{kind}.pt")


if __name__ == "__main__":
    main()
