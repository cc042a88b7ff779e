"""A small experiment written by hand in the documented formats, with hostile tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
TOKENS = ["<bos>", HOSTILE, "</script><script>document.title='owned'</script>", " {{7*7}}\n", "<b>bold</b>", " end"]
N_PROMPT, N_LAYERS, N_HEADS = 2, 3, 2
TRAIT = "style/odd"


def scores(prompt: int) -> list[list[list[float]]]:
    """`[token][layer][point]`, all values different."""
    return [
        [[float(100 * prompt + 10 * token + 3 * layer + point) for point in range(3)] for layer in range(N_LAYERS)]
        for token in range(len(TOKENS))
    ]


def projection(prompt: int) -> dict[str, Any]:
    prompt_tokens, response_tokens = TOKENS[:N_PROMPT], TOKENS[N_PROMPT:]
    values = scores(prompt)
    velocity = [10.0] * (len(TOKENS) - 1)
    return {
        "prompt": {"text": "".join(prompt_tokens), "tokens": prompt_tokens, "n_tokens": len(prompt_tokens)},
        "response": {"text": "".join(response_tokens), "tokens": response_tokens, "n_tokens": len(response_tokens)},
        "projections": {"prompt": values[:N_PROMPT], "response": values[N_PROMPT:]},
        "dynamics": {"commitment_point": 4, "peak_velocity": 10.0, "persistence": 0, "velocity": velocity,
                     "acceleration": [0.0] * (len(TOKENS) - 2)},
        "metadata": {
            "inference_model": "tiny", "inference_experiment": "exp", "prompt_id": str(prompt), "prompt_set": "odd",
            "vector_source": {"model": "tiny", "experiment": "exp", "trait": TRAIT, "method": "probe", "layer": 1,
                              "component": "residual", "selected_by": "effect_size", "score": 2.5},
            "sublayers": ["residual_in", "after_attn", "residual_out"], "projection_date": "2026-01-01",
        },
    }  # fmt: skip


def attention() -> dict[str, Any]:
    entries = [
        {"token_idx": token, "context_size": token + 1,
         "by_layer": [[[1 / (token + 1)] * (token + 1)] * N_HEADS] * N_LAYERS}
        for token in range(len(TOKENS))
    ]  # fmt: skip
    return {"prompt_id": "1", "prompt_set": "odd", "n_layers": N_LAYERS, "n_heads": N_HEADS, "tokens": TOKENS,
            "n_prompt_tokens": N_PROMPT, "n_response_tokens": len(TOKENS) - N_PROMPT, "attention": entries}  # fmt: skip


def logit_lens() -> dict[str, Any]:
    entries = [
        {"token_idx": token, "actual_next_token": TOKENS[token + 1],
         "by_layer": [{"layer": layer, "top_k": [{"token": HOSTILE, "prob": 0.5}, {"token": "b", "prob": 0.25}],
                       "actual_rank": token + layer + 1, "actual_prob": 0.125} for layer in range(N_LAYERS)]}
        for token in range(len(TOKENS) - 1)
    ]  # fmt: skip
    return {"tokens": TOKENS, "n_prompt_tokens": N_PROMPT, "n_response_tokens": len(TOKENS) - N_PROMPT,
            "n_layers": N_LAYERS, "top_k": 2, "predictions": entries}  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_experiment(root: Path) -> Path:
    """Experiment `exp`: prompts 1, 2 and 3 of the set `odd`; 1 has every file, 3 only its capture."""
    folder = root / "experiments" / "exp"
    raw = folder / "inference" / "raw" / "residual" / "odd"
    raw.mkdir(parents=True)
    for prompt in (1, 2, 3):
        (raw / f"{prompt}.pt").write_bytes(b"not read by the page")
    for prompt in (1, 2):
        write(folder / "inference" / TRAIT / "residual_stream" / "odd" / f"{prompt}.json", projection(prompt))
    write(folder / "analysis" / "per_token" / "odd" / "1_attention.json", attention())
    write(folder / "analysis" / "per_token" / "odd" / "1_logit_lens.json", logit_lens())
    vectors = folder / "extraction" / TRAIT / "vectors"
    vectors.mkdir(parents=True)
    for layer in range(N_LAYERS):
        (vectors / f"probe_layer{layer}.pt").write_bytes(b"not read by the page")
    write(vectors / "metadata.json", {"extraction_model": "tiny", "num_layers": N_LAYERS, "position": "response_mean"})
    rows = [
        {"trait": TRAIT, "method": "probe", "layer": layer, "component": "residual", "val_accuracy": 0.9,
         "val_auroc": 0.8, "val_effect_size": 1.0 + layer % 2, "random_auroc_p95": 0.6}
        for layer in range(N_LAYERS)
    ]  # fmt: skip
    write(folder / "extraction" / "extraction_evaluation.json", {"all_results": rows, "best_vectors": {}})
    return root


@pytest.fixture
def page_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment in the current folder, so that commands need no root."""
    monkeypatch.chdir(tmp_path)
    return write_experiment(tmp_path)
