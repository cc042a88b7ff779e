"""The engine `hooked`: TransformerLens's HookedTransformer, for the architectures that `hooked_config` covers.

TransformerLens 4 removed HookedTransformer: code that only version 3 has is imported lazily, and only in this module,
in `hooked_config` and in `fast`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.checkpoint import fingerprint
from tlcapture.models.engines.base import EXTERNAL_PREFIX, Model, StepResult, soft_cap
from tlcapture.models.engines.hooked_config import hooked_fields, weight_converter
from tlcapture.models.engines.tokenizers import for_transformer_lens, without_filled_in_bos
from tlcapture.models.engines.weight_layout import (
    join_in_place,
    laid_out_on,
    lay_out_in_place,
    share_tables_in_place,
)
from tlcapture.models.fast.forward import final_norm, unembed
from tlcapture.shapes import Logits, Mask, Residual, Rows, Tokens
from tlcapture.version import installed

FAST = os.environ.get("TLCAPTURE_FAST", "1") != "0"  # whether models are loaded as FastHookedTransformer


def has_hooked_transformer() -> bool:
    """Whether the installed TransformerLens has HookedTransformer."""
    return int(installed("transformer_lens").split(".")[0]) < 4


def why_no_hooked_transformer() -> str | None:
    """Why the engine `hooked`, the faster one, is missing and how to get it; `None` if it is there."""
    if has_hooked_transformer():
        return None
    found = installed("transformer_lens")
    return f'TransformerLens {found} has no HookedTransformer; pip install "transformer_lens<4" gives engine hooked'


def require_hooked_transformer() -> None:
    """Raise `ModelError`, which names the version to install, if TransformerLens has no HookedTransformer."""
    reason = why_no_hooked_transformer()
    if reason is not None:
        raise ModelError(f"engine 'hooked' is missing: {reason}; or use --engine bridge")


class HookedModel(Model):
    """A HookedTransformer or FastHookedTransformer: every step is a call of its `run_with_cache`."""

    engine = "hooked"

    _decoder: Any = None  # the last one: later batches use it again

    def start(self, batch_size: int) -> Any:
        """An empty `past_kv_cache`, which can also be passed to `tl` directly."""
        if self._is_fast:
            return self.tl.start_cache(batch_size)
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.tl.cfg, self.device, batch_size)

    def reserve(self, state: Any, n_positions: int) -> None:
        """Let a new batch decode in buffers of fixed shape, where the device gains from it."""
        if not self._is_fast:
            return
        from tlcapture.models.fast import decoder

        if self.device.type not in decoder.FIXED_ON or getattr(state, "state", None) is None:
            return
        n_rows, weight = len(state.previous_attention_mask), self.tl.embed.W_E
        n_positions = decoder.capacity(n_positions, self.n_ctx)
        if self._decoder is None or not self._decoder.fits(n_rows, n_positions, weight):
            self._decoder = None  # its memory may be needed
            shape = (self.n_layers, self.n_key_value_heads, self.d_head)
            self._decoder = decoder.Decoder(n_rows, n_positions, shape, weight)
        self._decoder.lend(state, n_positions)

    def release(self) -> None:
        """Free the buffers and recorded steps that are kept for the next batch."""
        self._decoder = None

    @torch.no_grad()
    def step(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str], *, want_logits: bool) -> StepResult:
        """Call `run_with_cache`, which extends the `past_kv_cache` of `state` in place, or replay such a call."""
        decoder = getattr(state, "decoder", None)
        if decoder is None or not decoder.can_step(state, tokens):
            return self._run(tokens, mask, state, hooks, want_logits=want_logits)

        def run(tokens: Tokens, mask: Mask, state: Any, hooks: Set[str]) -> Any:
            step = self._run(tokens, mask, state, hooks, want_logits=True)
            return step.logits, step.cache

        on = {"is_hooked": self.tl.is_hooked, "recordable": self.tl.recordable_key}
        return StepResult(*decoder.step(state, tokens, hooks, run, **on))

    def _run(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str], *, want_logits: bool) -> StepResult:
        residual, cache = self.tl.run_with_cache(
            tokens.to(self.device),
            names_filter=hooks.__contains__,
            return_cache_object=False,
            attention_mask=mask.to(self.device),
            past_kv_cache=state,
            # Unembedding every prompt position would cost more than the rest of a short prompt.
            stop_at_layer=self.n_layers,
        )
        return StepResult(self.unembed(residual[:, -1:])[:, 0] if want_logits else None, cache)

    def prompt_steps(
        self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str]
    ) -> Iterator[tuple[slice, StepResult]]:
        """Run the prompts of a new batch: in micro-batches by FastHookedTransformer, else in one step."""
        if not self._is_fast:
            yield from super().prompt_steps(tokens, mask, state, hooks)
            return
        for rows, width, part in self.tl.micro_batches(mask.to(self.device), state):
            yield rows, self.step(tokens[rows, -width:], mask[rows, -width:], part, hooks, want_logits=True)

    @property
    def most_prompt_positions(self) -> int | None:
        """The maximum of positions in a micro-batch."""
        if not self._is_fast:
            return None
        from tlcapture.models.fast.forward import most_positions

        return most_positions(self.device)

    @property
    def computes_scores(self) -> bool:
        """Whether they are soft-capped, or TransformerLens computes them."""
        return not self._is_fast or float(getattr(self.tl.cfg, "attn_scores_soft_cap", -1.0)) > 0

    def keep(self, state: Any, rows: Rows) -> None:
        """Drop all rows from the cache except `rows`, a boolean mask `[batch]`."""
        from tlcapture.models.fast.cache import keep_rows

        keep_rows(state, rows)

    def branch(self, state: Any, rows: Sequence[int]) -> Any:
        """A new cache with copies of the given rows."""
        from tlcapture.models.fast.cache import branch_rows

        return branch_rows(state, rows, self.tl.cfg)

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        """Logits `[..., d_vocab]` of a residual stream `[..., d_model]`: final norm, unembedding and soft cap."""
        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        if self._is_fast:
            logits = unembed(self.tl.unembed, final_norm(self.tl, flat)[0])
        else:
            normed = self.tl.ln_final(flat) if self.tl.cfg.normalization_type is not None else flat
            logits = self.tl.unembed(normed)[0].clone()
        soft_cap(logits, self.tl.cfg.output_logits_soft_cap)
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    @property
    def _is_fast(self) -> bool:
        from tlcapture.models.fast.transformer import FastHookedTransformer

        return isinstance(self.tl, FastHookedTransformer)


def hooked_model(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    checkpoint_fingerprint: str,
    device: str,
    n_devices: int = 1,
    fast: bool = FAST,
) -> HookedModel:
    """A HookedTransformer with the weights of a Hugging Face model of a supported architecture.

    Args:
        device: the device of the model, the first one if there are several.
        n_devices: the number of devices over which the blocks are spread evenly.
        fast: whether to make it a FastHookedTransformer.

    Raises:
        ModelError: HookedTransformer does not compute something that the config asks for.
    """
    tl = _with_weights_of(model, name, device, n_devices)
    share_tables_in_place(tl)
    tl.set_tokenizer(for_transformer_lens(tokenizer, name))
    if fast:
        make_fast(tl)
        if n_devices == 1:
            join_in_place(tl)
    return HookedModel(tl.eval(), tokenizer, model.config, model.generation_config, name, checkpoint_fingerprint)


def from_hooked_transformer(hooked: Any, *, name: str | None = None) -> HookedModel:
    """Use an existing `HookedTransformer`; its weights must be unprocessed and it must have a tokenizer.

    The model is modified in place: its class becomes FastHookedTransformer, which computes the same values with a
    faster forward pass (unless `TLCAPTURE_FAST=0` or it is an instance of a subclass), and the memory layout of its
    weights changes.

    Raises:
        ModelError: it has no tokenizer; its norms are folded into its weights, which changes the basis of its residual
            stream; or TransformerLens 4 is installed, which has no HookedTransformer.
    """
    require_hooked_transformer()
    if hooked.tokenizer is None:
        raise ModelError("the HookedTransformer has no tokenizer: set one with set_tokenizer")
    if str(hooked.cfg.normalization_type).endswith("Pre"):
        raise ModelError(
            "the HookedTransformer was loaded with its norms folded: load it with "
            "HookedTransformer.from_pretrained_no_processing, or with tlcapture.load_model"
        )
    lay_out_in_place(hooked)
    if FAST:
        make_fast(hooked)
        join_in_place(hooked)
    # TransformerLens names parameters differently, so its fingerprint differs from that of the checkpoint.
    external_fingerprint = f"{EXTERNAL_PREFIX}{fingerprint(hooked)}"
    tokenizer, name = without_filled_in_bos(hooked.tokenizer), name or hooked.cfg.model_name
    return HookedModel(hooked, tokenizer, None, None, name, external_fingerprint)


def make_fast(hooked: Any) -> None:
    """Turn a HookedTransformer into a FastHookedTransformer in place; instances of subclasses are not changed."""
    from transformer_lens import HookedTransformer

    from tlcapture.models.fast.transformer import FastHookedTransformer

    if type(hooked) is HookedTransformer:
        hooked.__class__ = FastHookedTransformer


def _with_weights_of(model: Any, name: str, device: str, n_devices: int) -> Any:
    """A HookedTransformer on its devices, with the unprocessed weights of a Hugging Face model and no tokenizer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import fill_missing_keys

    fields = hooked_fields(model.config)
    cfg = HookedTransformerConfig(
        **fields, model_name=name.split("/")[-1], device=device, n_devices=n_devices, dtype=model.dtype
    )
    hooked = HookedTransformer(cfg, move_to_device=False)
    weights = fill_missing_keys(hooked, weight_converter(model.config)(model, cfg))
    first = device if n_devices == 1 else "cpu"  # the whole model may not fit on one device
    laid_out = laid_out_on(first, cfg.dtype, weights, gated_mlp=bool(cfg.gated_mlp))
    # Converters may add zero biases that the architecture does not have; nonzero ones mean a different model.
    unexpected = hooked.load_state_dict(laid_out, strict=False, assign=True).unexpected_keys
    if any(laid_out[key].any() for key in unexpected):
        raise ModelError(f"{name}: HookedTransformer has no parameters for its weights {', '.join(unexpected)}")
    hooked.requires_grad_(False)
    if n_devices == 1:
        hooked.to(device, print_details=False)
    else:
        spread(hooked)
    return hooked


def spread(hooked: Any) -> None:
    """Move each block of a HookedTransformer to the device to which its forward pass sends the residual stream.

    Modules before the blocks go to the device of the first block, modules after them to that of the last.
    TransformerLens's `move_model_modules_to_device` chooses devices by free memory, so a block may not be on the device
    of its input.
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    blocks = {f"blocks.{layer}": layer for layer in range(hooked.cfg.n_layers)}
    for name, module in hooked.named_children():
        if name != "blocks":
            layer = hooked.cfg.n_layers - 1 if name in ("ln_final", "unembed") else 0
            module.to(get_device_for_block_index(layer, hooked.cfg))
    for name, layer in blocks.items():
        hooked.get_submodule(name).to(get_device_for_block_index(layer, hooked.cfg))
