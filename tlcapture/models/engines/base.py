"""What every engine offers: a model that runs step by step and hands out activations under TransformerLens's names.

state = model.start(batch_size=1)
step = model.step(tokens, mask, state, hooks={"blocks.5.hook_resid_post"}, want_logits=True)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture.models.sizes import Measures
from tlcapture.shapes import LastLogits, Logits, Mask, Residual, Rows, Tokens, Vector
from tlcapture.views.hooks import hook

OWN_MARK = "tl-"  # begins the fingerprint of a model that was not loaded here


@dataclass(frozen=True)
class Step:
    """What one forward pass left: the last position's logits, where asked for, and the activations."""

    logits: LastLogits | None
    cache: dict[str, Tensor]


class Model(ABC):
    """A TransformerLens model on one of the engines, its tokenizer and its measures.

    `tl` is the TransformerLens model itself (`HookedTransformer` or `TransformerBridge`), `hf_config`
    and `generation_config` the checkpoint's own.
    """

    engine: str

    def __init__(self, tl: Any, tokenizer: Any, hf_config: Any, generation_config: Any, name: str, fingerprint: str):
        self.tl = tl
        self.tokenizer = tokenizer
        self.hf_config = hf_config
        self.generation_config = generation_config
        self.name = name
        self.fingerprint = fingerprint
        cfg = tl.cfg
        self.n_layers = int(cfg.n_layers)
        self.d_model = int(cfg.d_model)
        self.n_heads = int(cfg.n_heads)
        self.n_key_value_heads = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
        self.d_head = int(cfg.d_head)
        self.n_ctx = _steady_context(hf_config, int(cfg.n_ctx))
        self.d_vocab = int(cfg.d_vocab)
        weight = next(iter(tl.parameters()))
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device

    @property
    def last_device(self) -> torch.device:
        """Where the final norm and the unembedding are; `device` is where tokens go in."""
        return next(iter(self.tl.unembed.parameters())).device

    @property
    def measures(self) -> Measures:
        return Measures(
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_key_value_heads=self.n_key_value_heads,
            d_head=self.d_head,
            d_mlp=int(self.tl.cfg.d_mlp or 4 * self.d_model),
            d_vocab=self.d_vocab,
        )

    @property
    def revision(self) -> str | None:
        """The hub's commit hash of the checkpoint; `None` for one that did not come from there."""
        return getattr(self.hf_config, "_commit_hash", None)

    @property
    def hook_names(self) -> Set[str]:
        """Names of all activations that the model can hand out, in TransformerLens's words."""
        return self.tl.hook_dict.keys()

    @property
    def has_parallel_blocks(self) -> bool:
        """Whether blocks run attention and MLP side by side, with no residual in between."""
        return hook("after_attn", 0) not in self.hook_names

    @abstractmethod
    def start(self, batch_size: int) -> Any:
        """A state without any position: the keys and values of a batch, and its mask."""

    @abstractmethod
    def step(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str], *, want_logits: bool) -> Step:
        """Run `run_with_cache` on the next positions of a batch and extend `state` by them.

        `mask` is 0 where `tokens` is left padding. `hooks` names the activations to hand out; they
        have the shapes of TransformerLens, `[batch, pos, ...]` (patterns `[batch, head, pos, key]`).
        """

    def prompt_steps(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str]) -> Iterator[tuple[slice, Step]]:
        """Run the prompts of a batch that has just started: in one step, or in as many parts as are faster.

        Yields which rows a part has, and its step; a part's positions are the last ones of `tokens`, as many as
        its longest prompt has.
        """
        yield slice(0, len(tokens)), self.step(tokens, mask, state, hooks, want_logits=True)

    @abstractmethod
    def keep(self, state: Any, rows: Rows) -> None:
        """Drop all but `rows` from the state of a batch."""

    @abstractmethod
    def branch(self, state: Any, rows: Sequence[int]) -> Any:
        """A new state whose rows are copies of the given rows of another, which stays as it is."""

    @abstractmethod
    def unembed(self, residual: Residual) -> Logits:
        """The model's own final norm, unembedding and soft cap, applied to any residual stream: logits that nobody
        else holds, whoever hooked the unembedding."""

    @torch.no_grad()
    def final_norm(self, residual: Residual) -> Residual:
        """The model's own final norm, in float32 and on the device of `residual`."""
        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        return self.tl.ln_final(flat).reshape(residual.shape).to(residual.device, torch.float32)

    def final_norm_gain(self) -> Vector:
        """The final norm's gain, whatever its kind: half the difference of its answers to a vector of
        mean 0 and mean square 1 and to its negative, in which a bias cancels."""
        probe = torch.ones(self.d_model)
        probe[1::2] = -1
        return (self.final_norm(probe) - self.final_norm(-probe)) / 2 * probe


def _steady_context(config: Any, n_ctx: int) -> int:
    """For how many positions a model's rotary frequencies are what they are for one.

    Those of LongRoPE become others for all tokens, and all rows of a batch, once one row is longer than
    the length of pretraining: what a prompt yields would depend on what runs beside it and comes after it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    return min(n_ctx, int(rope["original_max_position_embeddings"])) if rope.get("rope_type") == "longrope" else n_ctx
