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
from tlcapture.models.fast import FastForward, FastState
from tlcapture.shapes import Logits, Mask, Residual, Rows, Tokens

FAST = os.environ.get("TLCAPTURE_FAST", "1") != "0"  # whether HookedTransformer's blocks go through FastForward


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
    """HookedTransformer; with `fast`, its blocks are computed by `FastForward` where that supports them."""

    engine = "hooked"

    def __init__(self, *args: Any, fast: bool = FAST):
        super().__init__(*args)
        self._fast = FastForward(self.tl) if fast and FastForward.supports(self.tl) else None

    def start(self, batch_size: int) -> Any:
        # Asked again for every batch: the model is its user's, whose options and weights may have changed.
        if self._fast is not None and FastForward.supports(self.tl):
            self._fast.refresh()
            return FastState.empty(batch_size, self.device)
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.tl.cfg, self.device, batch_size)

    @torch.no_grad()
    def step(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str], *, want_logits: bool) -> Step:
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        if isinstance(state, FastState):
            assert self._fast is not None
            residual, cache = self._fast(tokens, mask, state, hooks)
        else:
            residual, cache = self.tl.run_with_cache(
                tokens,
                names_filter=hooks.__contains__,
                return_cache_object=False,
                attention_mask=mask,
                past_kv_cache=state,
                # Unembedding every prompt position would cost more than the rest of a short prompt.
                stop_at_layer=self.n_layers,
            )
        return Step(self.unembed(residual[:, -1:])[:, 0] if want_logits else None, cache)

    def prompt_steps(self, tokens: Tokens, mask: Mask, state: Any, hooks: Set[str]) -> Iterator[tuple[slice, Step]]:
        if not isinstance(state, FastState):
            yield from super().prompt_steps(tokens, mask, state, hooks)
            return
        assert self._fast is not None
        for rows, width, part in self._fast.parts(mask.to(self.device), state):
            yield rows, self.step(tokens[rows, -width:], mask[rows, -width:], part, hooks, want_logits=True)

    def keep(self, state: Any, rows: Rows) -> None:
        rows = rows.to(self.device)
        if isinstance(state, FastState):
            return state.keep(rows)
        for entry in state.entries:
            kept = rows.to(entry.past_keys.device)
            entry.past_keys, entry.past_values = entry.past_keys[kept], entry.past_values[kept]
        state.previous_attention_mask = state.previous_attention_mask[rows]

    def branch(self, state: Any, rows: Sequence[int]) -> Any:
        if isinstance(state, FastState):
            return state.branch(rows)
        index = torch.tensor(rows, device=self.device)
        branched = self.start(len(rows))
        # TransformerLens extends its cache by making new tensors: nothing of the old state is written to.
        for entry, origin in zip(branched.entries, state.entries, strict=True):
            chosen = index.to(origin.past_keys.device)
            entry.past_keys, entry.past_values = origin.past_keys[chosen], origin.past_values[chosen]
        branched.previous_attention_mask = state.previous_attention_mask[index]
        return branched

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        from transformer_lens.utilities import apply_softcap

        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        normed = self.tl.ln_final(flat) if self.tl.cfg.normalization_type is not None else flat
        logits = self.tl.unembed(normed)[0].clone() if self._fast is None else self._fast.unembed(normed[0])
        logits = apply_softcap(logits, self.tl.cfg.output_logits_soft_cap)
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])


def hooked_model(
    model: Any, tokenizer: Any, *, name: str, mark: str, device: str, n_devices: int = 1, fast: bool = FAST
) -> HookedModel:
    """A HookedTransformer with the weights of a Hugging Face model of an architecture that it covers.

    Its blocks are spread evenly over `n_devices`, from `device` on.
    """
    tl = _hooked_transformer(model, tokenizer, name, device, n_devices)
    return HookedModel(tl, tokenizer, model.config, model.generation_config, name, mark, fast=fast)


def from_hooked_transformer(hooked: Any, *, name: str | None = None) -> HookedModel:
    """Take a `HookedTransformer` that somebody else loaded; it must be unprocessed and have a tokenizer.

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
    # TransformerLens's own parameters have other names: its mark is comparable with its like only.
    mark = f"{OWN_MARK}{fingerprint(hooked)}"
    return HookedModel(hooked, without_filled_in_bos(hooked.tokenizer), None, None, name or hooked.cfg.model_name, mark)


def _hooked_transformer(model: Any, tokenizer: Any, name: str, device: str, n_devices: int) -> Any:
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
