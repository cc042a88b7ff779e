"""The engine `bridge`: TransformerLens's TransformerBridge, which wraps the Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints import fingerprint
from tlcapture.models.engines.base import EXTERNAL_PREFIX, Model, Step
from tlcapture.models.engines.booting import text_only
from tlcapture.models.engines.hooked_config import architecture_of
from tlcapture.models.engines.newer_transformers import support_newer_transformers
from tlcapture.models.engines.tokenizers import for_transformer_lens, without_filled_in_bos
from tlcapture.models.engines.versions import version_advice
from tlcapture.models.processes import ProcessRefusedError
from tlcapture.models.sizes import Measures
from tlcapture.shapes import Logits, Mask, Residual, Rows, Tokens
from tlcapture.text import first_line
from tlcapture.views.hooks import hook, is_pattern


@dataclass
class _BridgeState:
    mask: Tensor
    past: Any = None


class BridgeModel(Model):
    """A TransformerBridge: the Hugging Face model itself with TransformerLens's hooks."""

    engine = "bridge"

    @property
    def measures(self) -> Measures:
        """The dimensions from the Hugging Face config, since that of TransformerBridge lacks the MLP width of OPT."""
        return Measures.of(self.hf_config)

    def start(self, batch_size: int) -> _BridgeState:
        """An empty state; the first step creates its `past_key_values`."""
        return _BridgeState(torch.zeros(batch_size, 0, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def step(self, tokens: Tokens, mask: Mask, state: _BridgeState, hooks: Set[str], *, want_logits: bool) -> Step:
        """Call `run_with_cache` with position ids that skip left padding; patterns cover all keys so far."""
        state.mask = torch.cat([state.mask, mask.to(self.device)], dim=1)
        positions = (state.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        (logits, state.past), cache = self.tl.run_with_cache(
            tokens.to(self.device),
            names_filter=sorted(hooks),
            return_cache_object=False,
            return_type="logits_and_cache",
            attention_mask=state.mask,
            position_ids=positions,
            past_key_values=state.past,
            use_cache=True,
            logits_to_keep=1,
        )
        handed_out = {name: _with_all_keys(name, cache[name], state.mask.shape[1]) for name in hooks}
        return Step(logits[:, -1] if want_logits else None, handed_out)

    def keep(self, state: _BridgeState, rows: Rows) -> None:
        """Drop all rows from the mask and `past_key_values` except `rows`, a boolean mask `[batch]`."""
        rows = rows.to(self.device)
        state.mask = state.mask[rows]
        state.past.batch_select_indices(rows.nonzero()[:, 0])

    def branch(self, state: _BridgeState, rows: Sequence[int]) -> _BridgeState:
        """A new state with copies of the given rows of the mask and `past_key_values`."""
        index = torch.tensor(rows, device=self.device)
        past = copy.deepcopy(state.past)
        if past is not None:
            past.batch_select_indices(index)
        return _BridgeState(state.mask[index], past)

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        """Logits `[..., d_vocab]` of a residual stream `[..., d_model]`, with the soft cap of the checkpoint."""
        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        logits = self.tl.unembed(self.tl.ln_final(flat)).clone()
        cap = getattr(self.hf_config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    def check(self) -> None:
        """Raise `ModelError` if a required hook is missing or activations would differ from those of Hugging Face."""
        first, last = hook("attn_out", 0), hook("residual_out", self.n_layers - 1)
        missing = [name for name in (last, first, hook("pattern", 0)) if name not in self.hook_names]
        missing += [name for name in ("ln_final", "unembed") if not hasattr(self.tl, name)]
        if missing:
            raise self._refusal(f"TransformerBridge has no {missing[0]} for it")
        tokens = torch.arange(1, 7).unsqueeze(0) % self.d_vocab
        whole = self.step(tokens, torch.ones_like(tokens), self.start(1), {first, last}, want_logits=True)
        assert whole.logits is not None
        if not _is_close(self.unembed(whole.cache[last][:, -1]), whole.logits):
            raise self._refusal(
                "its logits involve more than final norm, unembedding and soft cap, which a logit lens would silently "
                "omit"
            )
        if not _is_close(self._padded_and_in_two_steps(tokens, first), whole.cache[first][0]):
            raise self._refusal(
                "TransformerBridge computes different attention for it token by token in a padded batch than in one "
                f"pass; {version_advice()}"
            )

    def _padded_and_in_two_steps(self, tokens: Tokens, hook: str) -> Tensor:
        """An activation `[pos, ...]` of `tokens` in a batch with a longer row, the last token in a separate step."""
        n_pad, n_tokens = 2, tokens.shape[1]
        longer = tokens.flip(1)[:, :n_pad]
        rows = torch.cat([torch.cat([torch.zeros_like(longer), longer]), tokens.expand(2, -1)], dim=1)
        mask = torch.ones_like(rows)
        mask[0, :n_pad] = 0
        state = self.start(2)
        spans = (slice(0, -1), slice(-1, None))
        steps = [self.step(rows[:, span], mask[:, span], state, {hook}, want_logits=True) for span in spans]
        return torch.cat([step.cache[hook] for step in steps], dim=1)[0, -n_tokens:]

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{self.name}: {architecture_of(self.hf_config)} is not supported: {reason}")


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two activations are equal up to 16-bit rounding.

    Non-finite activations of the model itself are accepted: they do not depend on the architecture, and captures
    report them.
    """
    ours, theirs = ours.float(), theirs.float()
    return not theirs.isfinite().all() or torch.allclose(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


def _with_all_keys(name: str, activation: Tensor, n_keys: int) -> Tensor:
    """A pattern padded with zeros to all keys so far, since Hugging Face drops keys outside a sliding window."""
    missing = n_keys - activation.shape[-1] if is_pattern(name) else 0
    return torch.nn.functional.pad(activation, (missing, 0)) if missing else activation


def bridge_model(model: Any, tokenizer: Any, *, name: str, checkpoint_fingerprint: str, device: str) -> BridgeModel:
    """Wrap a Hugging Face model in a TransformerBridge, which modifies its modules.

    A model that was loaded across several devices is not moved.

    Raises:
        ModelError: the bridge does not run this architecture, or its activations differ from those of Hugging Face.
    """
    from transformer_lens.model_bridge import TransformerBridge

    is_spread = bool(getattr(model, "hf_device_map", None))
    if not is_spread:
        model.to(device)
    try:
        with text_only():
            tl = TransformerBridge.boot_transformers(
                name,
                hf_model=model,
                tokenizer=for_transformer_lens(tokenizer, name),
                device=None if is_spread else device,
                dtype=model.dtype,
            )
        support_newer_transformers(tl.original_model, model.dtype)
        bridge = BridgeModel(tl, tokenizer, model.config, model.generation_config, name, checkpoint_fingerprint)
        bridge.check()
    except (ModelError, torch.OutOfMemoryError):
        raise
    except (ValueError, NotImplementedError, AttributeError, RuntimeError, ProcessRefusedError) as error:
        reason = f"TransformerBridge does not run {architecture_of(model.config)}: {first_line(error)}"
        advice = "" if isinstance(error, ProcessRefusedError) else f"; {version_advice()}"
        raise ModelError(f"{name}: {reason}{advice}") from None
    return bridge


def from_transformer_bridge(bridge: Any, *, name: str | None = None) -> BridgeModel:
    """Use an existing `TransformerBridge`; its weights must be unprocessed and it must have a tokenizer.

    Raises:
        ModelError: it has no tokenizer; its norms are folded into its weights, which changes the basis of its residual
            stream; it does not wrap a Hugging Face model; or its activations differ from those of Hugging Face.
    """
    if bridge.tokenizer is None:
        raise ModelError("the TransformerBridge has no tokenizer: set its attribute tokenizer")
    if bridge._weights_processed:
        raise ModelError(
            "the TransformerBridge has processed weights, with its norms folded: boot it again without "
            "enable_compatibility_mode or with enable_compatibility_mode(no_processing=True)"
        )
    from transformers import PretrainedConfig

    hf = bridge.original_model
    if not isinstance(getattr(hf, "config", None), PretrainedConfig):
        raise ModelError("the TransformerBridge does not wrap a Hugging Face model: boot it with boot_transformers")
    # The bridge adds modules to the model, so its fingerprint differs from that of the checkpoint.
    external_fingerprint = f"{EXTERNAL_PREFIX}{fingerprint(hf)}"
    generation_config = getattr(hf, "generation_config", None)
    tokenizer = without_filled_in_bos(bridge.tokenizer)
    name = name or bridge.cfg.model_name
    support_newer_transformers(hf, hf.dtype)
    model = BridgeModel(bridge, tokenizer, hf.config, generation_config, name, external_fingerprint)
    model.check()
    return model
