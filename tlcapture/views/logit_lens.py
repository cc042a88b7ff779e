"""The logit lens: what each layer's residual stream would predict if it were the last.

Each layer's `residual_out` goes through the model's own final norm, unembedding and soft cap, with
that layer's own normalisation scale. The last layer is the model's own next-token distribution.

Source: nostalgebraist, "interpreting GPT: the logit lens" (LessWrong, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcapture.rounding import PROBABILITY_DIGITS, round_significant
from tlcapture.shapes import Logits, Residual

TOP_K = 50
CHUNK = 256  # tokens whose logits over the whole vocabulary are in memory at a time


@dataclass(frozen=True)
class LogitLens:
    """Predictions for every token that has a next one, by layer.

    `top_ids`, `top_probs`: the `top_k` likeliest ids and their probabilities, likeliest first;
    `actual_rank` counts from 1; `actual_prob` is that of the token that came.
    """

    top_ids: Int[Tensor, "n_layers n_predictions top_k"]
    top_probs: Float[Tensor, "n_layers n_predictions top_k"]
    actual_rank: Int[Tensor, "n_layers n_predictions"]
    actual_prob: Float[Tensor, "n_layers n_predictions"]

    def to_json(
        self,
        *,
        prompt_id: str,
        prompt_set: str,
        tokens: Sequence[str],
        n_prompt_tokens: int,
        token_texts: Callable[[Sequence[int]], list[str]],
    ) -> dict[str, Any]:
        """The content of `{id}_logit_lens.json`; probabilities have 4 significant digits."""
        n_layers, n_predictions, top_k = self.top_ids.shape
        flat = token_texts(self.top_ids.flatten().tolist())
        probs = round_significant(self.top_probs.numpy(), PROBABILITY_DIGITS).tolist()
        actual = round_significant(self.actual_prob.numpy(), PROBABILITY_DIGITS).tolist()
        ranks = self.actual_rank.tolist()

        def layer_json(layer: int, token: int) -> dict[str, Any]:
            start = (layer * n_predictions + token) * top_k
            names = flat[start : start + top_k]
            top = [{"token": name, "prob": prob} for name, prob in zip(names, probs[layer][token], strict=True)]
            return {
                "layer": layer,
                "top_k": top,
                "actual_rank": ranks[layer][token],
                "actual_prob": actual[layer][token],
            }

        return {
            "prompt_id": prompt_id,
            "prompt_set": prompt_set,
            "tokens": list(tokens),
            "n_prompt_tokens": n_prompt_tokens,
            "n_response_tokens": len(tokens) - n_prompt_tokens,
            "n_layers": n_layers,
            "top_k": top_k,
            "predictions": [
                {
                    "token_idx": token,
                    "actual_next_token": tokens[token + 1],
                    "by_layer": [layer_json(layer, token) for layer in range(n_layers)],
                }
                for token in range(n_predictions)
            ],
        }


def logit_lens_view(
    residual_out: Callable[[int], Residual],
    n_layers: int,
    token_ids: Sequence[int],
    unembed: Callable[[Residual], Logits],
    *,
    top_k: int = TOP_K,
) -> LogitLens:
    """Read every layer of one prompt's run through the model's unembedding.

    Args:
        residual_out: the `[n_tokens, d_model]` residual stream behind a layer.
        token_ids: ids of the same tokens; the rank of a next token comes from its id.
        unembed: the model's final norm, unembedding and soft cap.
    """
    next_ids = torch.tensor(token_ids[1:], dtype=torch.long)
    by_layer = []
    for layer in range(n_layers):
        pieces = zip(residual_out(layer)[:-1].split(CHUNK), next_ids.split(CHUNK), strict=True)
        found = [_predictions(unembed(residual), ids, top_k) for residual, ids in pieces]
        by_layer.append([torch.cat(column) for column in zip(*found, strict=True)])
    return LogitLens(*(torch.stack(column) for column in zip(*by_layer, strict=True)))


def _predictions(
    logits: Logits, next_ids: Int[Tensor, " n_predictions"], top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.float()
    next_ids = next_ids.to(logits.device)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    top, top_ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    actual = logits.gather(-1, next_ids[:, None])
    rank = (logits > actual).sum(dim=-1) + 1
    probs = ((top - normaliser).exp(), (actual - normaliser).exp()[:, 0])
    return top_ids.cpu(), probs[0].cpu(), rank.cpu(), probs[1].cpu()
