"""Projections, attention patterns and logit lens with known numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tlcapture.explore.figures.attention_heads import AttentionHeads
from tlcapture.explore.figures.logit_lens_table import LogitLensTable
from tlcapture.traits.projections.token_scores import TokenScores

HOSTILE = "<img src=x onerror=alert(1)>"
TOKENS = ["<bos>", "Say", "\n", HOSTILE, " $5$", " \x1b[2J", "</script><script>alert(2)</script>", '" onmouseover="x']
N_PROMPT, N_LAYERS = 3, 4
POINTS = ["residual_in", "after_attn", "residual_out"]


def projected(**changes: Any) -> TokenScores:
    """Eight tokens, four layers: `residual_out` of layer `l` is `token + 10 * l`, the first token a sink of -5000.
    Other points are 1 less."""
    scores = np.arange(len(TOKENS))[:, None, None] + 10.0 * np.arange(N_LAYERS)[None, :, None] + np.array([-1, -1, 0])
    scores[0] = -5000.0
    fields: dict[str, Any] = {
        "prompt_set": "short",
        "prompt_id": "1",
        "trait": "tone/loud",
        "component": "residual",
        "method": "probe",
        "layer": 2,
        "tokens": TOKENS,
        "n_prompt_tokens": N_PROMPT,
        "scores": scores,
        "sublayers": POINTS,
        "layers": range(N_LAYERS),
        "commitment_point": 5,
        "persistence": 0,
    }
    return TokenScores(**{**fields, **changes})


def heads() -> AttentionHeads:
    """Two heads: the first attends uniformly, the second to the query itself."""
    n_tokens = len(TOKENS)
    even = np.tril(np.ones((n_tokens, n_tokens))) / np.arange(1, n_tokens + 1)[:, None]
    patterns = np.stack([even, np.eye(n_tokens)]).astype(np.float32)
    return AttentionHeads("short", "1", 1, TOKENS, N_PROMPT, patterns, "a test")


def predictions() -> LogitLensTable:
    """In layer `l`, the hostile token is the most likely one with probability `0.2 * (l + 1)`."""
    n = len(TOKENS) - 1
    probs = np.broadcast_to(
        np.array([[0.2 * (layer + 1), 0.1] for layer in range(N_LAYERS)])[:, None], (N_LAYERS, n, 2)
    )
    return LogitLensTable(
        "short", "1", TOKENS, N_PROMPT, [[[HOSTILE, " b"]] * n] * N_LAYERS, probs.copy(),
        np.full((N_LAYERS, n), 3), np.full((N_LAYERS, n), 0.05), "a test",
    )  # fmt: skip
