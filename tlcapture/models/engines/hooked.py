"""The engine `hooked`: TransformerLens's HookedTransformer, for the architectures that `hooked_config` covers.

TransformerLens 4 has it no more: everything from TransformerLens that only version 3 has is imported here, in
`hooked_config` or in `fast`, and when it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from importlib.metadata import version
from typing import Any

import torch

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints import fingerprint
from tlcapture.models.engines.base import OWN_MARK, Model, Step
from tlcapture.models.engines.hooked_config import hooked_fields, weight_converter
from tlcapture.models.engines.tokenizers import for_transformer_lens, without_filled_in_bos
from tlcapture.models.engines.weight_layout import lay_out, lay_out_in_place, memory_order
from tlcapture.models.fast.forward import unembed
from tlcapture.shapes import Logits, Mask, Residual, Rows, Tokens

FAST = os.environ.get("TLCAPTURE_FAST", "1") != "0"  # whether models are made FastHookedTransformer


def has_hooked_transformer() -> bool:
    """Whether the TransformerLens that is installed has HookedTransformer."""
    return int(version("transformer_lens").split(".")[0]) < 4


def require_hooked_transformer() -> None:
    """Raise `ModelError` where there is none, with what to install."""
    if not has_hooked_transformer():
        raise ModelError(
            f"engine 'hooked' needs HookedTransformer, which TransformerLens {version('transformer_lens')} does not "
            'have: use --engine bridge, or pip install "transformer_lens>=3.9,<4"'
        )


class HookedModel(Model):
    """HookedTransformer, or FastHookedTransformer: every step is a call of its `run_with_cache`."""

    engine = "hooked"

    def start(self, batch_size: int) -> Any:
        """An empty `past_kv_cache`, which calls of `tl` take as well."""
        if self._is_fast:
            return self.tl.start_cache(batch_size)
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.tl.cfg, self.device, batch_size)

    @torch.no_grad()
    def step(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str], *, want_logits: bool) -> Step:
        residual, cache = self.tl.run_with_cache(
            tokens.to(self.device),
            names_filter=hooks.__contains__,
            return_cache_object=False,
            attention_mask=mask.to(self.device),
            past_kv_cache=state,
            # Unembedding every prompt position would cost more than the rest of a short prompt.
            stop_at_layer=self.n_layers,
        )
        return Step(self.unembed(residual[:, -1:])[:, 0] if want_logits else None, cache)

    def prompt_steps(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str]) -> Iterator[tuple[slice, Step]]:
        if not self._is_fast:
            yield from super().prompt_steps(tokens, mask, state, hooks)
            return
        for rows, width, part in self.tl.parts(mask.to(self.device), state):
            yield rows, self.step(tokens[rows, -width:], mask[rows, -width:], part, hooks, want_logits=True)

    def keep(self, state: Any, rows: Rows) -> None:
        from tlcapture.models.fast.cache import keep_rows

        keep_rows(state, rows.to(self.device))

    def branch(self, state: Any, rows: Sequence[int]) -> Any:
        from tlcapture.models.fast.cache import branch_rows

        return branch_rows(state, rows, self.tl.cfg)

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        from transformer_lens.utilities import apply_softcap

        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        normed = self.tl.ln_final(flat) if self.tl.cfg.normalization_type is not None else flat
        logits = unembed(self.tl.unembed, normed[0]) if self._is_fast else self.tl.unembed(normed)[0].clone()
        logits = apply_softcap(logits, self.tl.cfg.output_logits_soft_cap)
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    @property
    def _is_fast(self) -> bool:
        from tlcapture.models.fast.transformer import FastHookedTransformer

        return isinstance(self.tl, FastHookedTransformer)


def hooked_model(
    model: Any, tokenizer: Any, *, name: str, mark: str, device: str, n_devices: int = 1, fast: bool = FAST
) -> HookedModel:
    """A HookedTransformer with the weights of a Hugging Face model of an architecture that it covers.

    Its blocks are spread evenly over `n_devices`, from `device` on; with `fast` it is a FastHookedTransformer.
    """
    tl = _hooked_transformer(model, tokenizer, name, device, n_devices, fast)
    return HookedModel(tl, tokenizer, model.config, model.generation_config, name, mark)


def from_hooked_transformer(hooked: Any, *, name: str | None = None) -> HookedModel:
    """Take a `HookedTransformer` that somebody else loaded; it must be unprocessed and have a tokenizer.

    The model itself is changed: its class becomes FastHookedTransformer, which computes the same by a faster forward
    pass (unless `TLCAPTURE_FAST=0`, or its class is another one already), and its weights are laid out anew in memory.

    Raises `ModelError` for one whose norms were folded into its weights, as its basis is another one, and under
    TransformerLens 4, which has no HookedTransformer.
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
    # TransformerLens's own parameters have other names: its mark is comparable with its like only.
    mark = f"{OWN_MARK}{fingerprint(hooked)}"
    return HookedModel(hooked, without_filled_in_bos(hooked.tokenizer), None, None, name or hooked.cfg.model_name, mark)


def make_fast(hooked: Any) -> None:
    """Make a FastHookedTransformer of a HookedTransformer, in place; a class of somebody's own stays what it is."""
    from transformer_lens import HookedTransformer

    from tlcapture.models.fast.transformer import FastHookedTransformer

    if type(hooked) is HookedTransformer:
        hooked.__class__ = FastHookedTransformer


def _hooked_transformer(model: Any, tokenizer: Any, name: str, device: str, n_devices: int, fast: bool) -> Any:
    """A HookedTransformer that takes over the weights of a Hugging Face model, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import fill_missing_keys

    fields = hooked_fields(model.config)
    cfg = HookedTransformerConfig(
        **fields, model_name=name.split("/")[-1], device=device, n_devices=n_devices, dtype=model.dtype
    )
    hooked = HookedTransformer(cfg, move_to_device=False)
    weights = fill_missing_keys(hooked, weight_converter(model.config)(model, cfg))
    gated = bool(cfg.gated_mlp)
    first = device if n_devices == 1 else "cpu"  # the whole need not fit on one device
    laid_out = {
        key: lay_out(value.detach().to(first, value.dtype if not value.is_floating_point() else cfg.dtype), order)
        for key, value in weights.items()
        for order in [memory_order(key, value, gated_mlp=gated)]
    }
    # A converter may name biases that the architecture has not; they are zero, or the model is another.
    unexpected = hooked.load_state_dict(laid_out, strict=False, assign=True).unexpected_keys
    if any(laid_out[key].any() for key in unexpected):
        raise ModelError(f"{name}: HookedTransformer has no place for its weights {', '.join(unexpected)}")
    hooked.requires_grad_(False)
    if n_devices == 1:
        hooked.to(device, print_details=False)
    else:
        spread(hooked)
    hooked.set_tokenizer(for_transformer_lens(tokenizer, name))
    if fast:
        make_fast(hooked)
    return hooked.eval()


def spread(hooked: Any) -> None:
    """Put each block where HookedTransformer's forward pass sends the residual stream for it, what comes before
    the blocks beside the first, and what comes after them beside the last.

    (`move_model_modules_to_device` goes by free memory, and would have blocks elsewhere than their input.)
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    blocks = {f"blocks.{layer}": layer for layer in range(hooked.cfg.n_layers)}
    for name, module in hooked.named_children():
        if name != "blocks":
            layer = hooked.cfg.n_layers - 1 if name in ("ln_final", "unembed") else 0
            module.to(get_device_for_block_index(layer, hooked.cfg))
    for name, layer in blocks.items():
        hooked.get_submodule(name).to(get_device_for_block_index(layer, hooked.cfg))
