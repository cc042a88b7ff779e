"""The interface of every engine: a model that runs step by step and returns activations by hook name.

state = model.start(batch_size=1)
step = model.step(tokens, mask, state, hooks={"blocks.5.hook_resid_post"}, want_logits=True)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tlcapture.models.sizes import Measures
from tlcapture.shapes import LastLogits, Logits, Mask, Residual, Rows, Tokens, Vector
from tlcapture.text import dtype_name
from tlcapture.views.hooks import attention_layers, hook

_CAPPED_TOGETHER = 2**24  # logits, which fit into a GPU's cache in 16 bits
EXTERNAL_PREFIX = "tl-"  # prefix of the fingerprints of models that tlcapture did not load itself


@dataclass(frozen=True, eq=False)
class StepResult:
    """The result of one forward pass.

    Attributes:
        logits: logits of the last position, `[batch, d_vocab]`; `None` unless they were requested.
        cache: the requested activations by hook name, `[batch, pos, ...]`.
    """

    logits: LastLogits | None
    cache: dict[str, Tensor]


class Model(ABC):
    """A TransformerLens model on one of the engines, with its tokenizer and dimensions.

    Attributes:
        engine: `hooked` or `bridge`.
        tl: the TransformerLens model (`HookedTransformer` or `TransformerBridge`).
        tokenizer: the checkpoint's tokenizer.
        hf_config: the Hugging Face config of the checkpoint, or `None`.
        generation_config: the generation config of the checkpoint, or `None`.
        name: the name by which the model was loaded.
        adapted: with an adapter that was merged into the weights its name (`adapter`), a hash of its files
            (`adapter_digest`), and the fingerprint of the weights without it (`base_fingerprint`); empty without one.
        fingerprint: a hash of the weights.
        n_ctx: the longest supported sequence, in tokens.
        dtype: the dtype of the weights.
        device: the device of the embedding, where tokens are sent.
    """

    engine: str

    def __init__(self, tl: Any, tokenizer: Any, hf_config: Any, generation_config: Any, name: str, fingerprint: str):
        self.tl = tl
        self.tokenizer = tokenizer
        self.hf_config = hf_config
        self.generation_config = generation_config
        self.name = name
        self.adapted: Mapping[str, str] = {}
        self.fingerprint = fingerprint
        cfg = tl.cfg
        self.n_layers = int(cfg.n_layers)
        self.d_model = int(cfg.d_model)
        self.n_heads = int(cfg.n_heads)
        self.n_key_value_heads = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
        self.d_head = int(cfg.d_head)
        self.n_ctx = _context_with_fixed_frequencies(hf_config, int(cfg.n_ctx))
        self.d_vocab = int(cfg.d_vocab)
        weight = next(iter(tl.parameters()))
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device

    def __repr__(self) -> str:
        dtype = dtype_name(self.dtype)
        adapter = f" with adapter {self.adapter!r}" if self.adapter else ""
        sizes = f"{self.n_layers} layers, d_model {self.d_model}"
        return f"<model {self.name!r}{adapter} on engine {self.engine}, {self.device}, {dtype}: {sizes}>"

    @property
    def adapter(self) -> str | None:
        """The adapter that was merged into the weights, as it was named; `None` without one."""
        return self.adapted.get("adapter")

    @property
    def last_device(self) -> torch.device:
        """The device of the final norm and the unembedding; `device` is that of the embedding."""
        return next(iter(self.tl.unembed.parameters())).device

    @property
    def measures(self) -> Measures:
        """The dimensions that determine memory and compute cost."""
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
        """The Hugging Face Hub commit hash of the checkpoint; `None` if it was not loaded from the Hub."""
        return getattr(self.hf_config, "_commit_hash", None)

    @property
    def hook_names(self) -> Set[str]:
        """TransformerLens names of all activations that the model can return."""
        return self.tl.hook_dict.keys()

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with attention: all, except in hybrids those whose mixer is recurrent or a convolution."""
        return attention_layers(self.n_layers, self.hook_names)

    @property
    def with_attention(self) -> tuple[int, ...] | None:
        """The layers with attention, or `None` if all have it."""
        return None if len(self.attention_layers) == self.n_layers else self.attention_layers

    @property
    def has_parallel_blocks(self) -> bool:
        """Whether attention and MLP of a block run in parallel, with no residual point between them."""
        return hook("after_attn", 0) not in self.hook_names and self.with_attention is None

    @property
    def most_prompt_positions(self) -> int | None:
        """The most positions in a step of `prompt_steps`, unless one prompt has more; `None` if there is one step."""
        return None

    @property
    def computes_scores(self) -> bool:
        """Whether attention scores are computed as a tensor even if nobody asks for the pattern."""
        return True

    @property
    def can_continue_in_pieces(self) -> bool:
        """Whether running several tokens after a state gives the same result as running all tokens at once."""
        return True

    @abstractmethod
    def start(self, batch_size: int) -> Any:
        """An empty state for a batch: its key-value cache and attention mask, with no positions yet."""

    def reserve(self, state: Any, n_positions: int) -> None:  # noqa: B027  most engines reserve nothing
        """Reserve memory for all positions that an empty state, or a new branch of a state, will have.

        Steps after the prompts are then of one token per row, which is not padding, and the tensors of a `StepResult`
        may be overwritten by the next step.
        """

    def prepare(self, hooks: Set[str]) -> None:  # noqa: B027  most engines need nothing
        """Find out how to return these activations, by passes that hooks of a batch must not see."""

    def release(self) -> None:  # noqa: B027  most engines keep nothing
        """Free the memory that was reserved for a batch and kept for the next."""

    @abstractmethod
    def step(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str], *, want_logits: bool) -> StepResult:
        """Call `run_with_cache` on the next positions of a batch and append them to `state`.

        Args:
            tokens: token ids of the new positions, `[batch, pos]`.
            mask: 0 where `tokens` is left padding, else 1, `[batch, pos]`.
            state: the state of the batch from `start`, modified in place.
            hooks: names of the activations to return, in the shapes of TransformerLens: `[batch, pos, ...]`, attention
                patterns `[batch, head, pos, key]`.
            want_logits: whether to compute the logits of the last position.
        """

    def prompt_steps(
        self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str]
    ) -> Iterator[tuple[slice, StepResult]]:
        """Run the prompts of a new batch, in one step or in several micro-batches if that is faster.

        Yields:
            The rows of each micro-batch and its step. Its positions are the last ones of `tokens`, as many as its
            longest prompt has.
        """
        yield slice(0, len(tokens)), self.step(tokens, mask, state, hooks, want_logits=True)

    @abstractmethod
    def keep(self, state: Any, rows: Rows) -> None:
        """Drop all rows from the state of a batch except `rows`, a boolean mask `[batch]`."""

    @abstractmethod
    def branch(self, state: Any, rows: Sequence[int]) -> Any:
        """A new state whose rows are copies of the given rows of `state`, which is not modified."""

    @abstractmethod
    def unembed(self, residual: Residual) -> Logits:
        """Logits `[..., d_vocab]` of a residual stream `[..., d_model]`: final norm, unembedding, scale and soft cap.

        The result is a new tensor: it shares no memory with tensors that hooks on the unembedding received.
        """

    @torch.no_grad()
    def final_norm(self, residual: Residual) -> Residual:
        """The residual stream `[..., d_model]` after the model's final norm, in float32 on the device of `residual`."""
        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        return self.tl.ln_final(flat).reshape(residual.shape).to(residual.device, torch.float32)

    @property
    def logit_scale(self) -> float:
        """The factor by which the model multiplies the output of its unembedding, before a soft cap."""
        return _logit_scale(self.hf_config.get_text_config()) if self.hf_config is not None else 1.0

    def final_norm_gain(self) -> Vector:
        """The gain of the final norm, `[d_model]`, for any kind of norm.

        It is half the difference between the norm's outputs for a vector of mean 0 and mean square 1 and for its
        negative, so that a bias cancels.
        """
        probe = torch.ones(self.d_model)
        probe[1::2] = -1
        return (self.final_norm(probe) - self.final_norm(-probe)) / 2 * probe


def _logit_scale(config: Any) -> float:
    factors = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
    scale = float(next(filter(None, (getattr(config, name, None) for name in factors)), 1.0))
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides, HyperCLOVA X multiplies
    return scale * divisor if str(config.model_type).startswith("hyperclovax") else scale / divisor


def _context_with_fixed_frequencies(config: Any, n_ctx: int) -> int:
    """The context length within which positions are computed alike whatever else is in the batch.

    LongRoPE switches to other frequencies for all tokens in all rows of a batch as soon as one row is longer than the
    pretraining length, so the activations of a prompt would depend on other prompts of its batch and on later tokens.
    Llama 4 scales queries from `floor_scale` tokens on, and counts the padding of a batch as tokens.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # of all layers, or by kind of layer
    lengths = [int(each["original_max_position_embeddings"]) for each in kinds if each.get("rope_type") == "longrope"]
    if getattr(config, "attn_temperature_tuning", False) and not all(getattr(config, "no_rope_layers", None) or ()):
        lengths.append(int(config.floor_scale) - 1)
    return min([n_ctx, *lengths])


def soft_cap(logits: Logits, cap: float | None) -> None:
    """Replace logits by `cap * tanh(logits / cap)` in place, some rows after others; there is no cap of 0 or less."""
    if cap is None or cap <= 0 or not logits.numel():
        return
    n_rows = max(1, _CAPPED_TOGETHER // logits.shape[-1])
    for piece in logits.view(-1, logits.shape[-1]).split(n_rows) if logits.is_contiguous() else (logits,):
        piece.div_(cap).tanh_().mul_(cap)
