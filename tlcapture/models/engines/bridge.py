"""The engine `bridge`: TransformerLens's TransformerBridge, which wraps the Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.checkpoint import fingerprint
from tlcapture.models.engines.base import EXTERNAL_PREFIX, Model, StepResult, soft_cap
from tlcapture.models.engines.booting import text_only
from tlcapture.models.engines.hook_layouts import (
    PLAIN,
    by_token,
    layouts,
    recordable_hooks,
    router_modules,
    router_scores,
)
from tlcapture.models.engines.hooked import FAST
from tlcapture.models.engines.hooked_config import architecture_of
from tlcapture.models.engines.more_adapters import register_adapters
from tlcapture.models.engines.newer_transformers import support_newer_transformers
from tlcapture.models.engines.tokenizers import for_transformer_lens, without_filled_in_bos
from tlcapture.models.engines.versions import ADDED_IN_4, found_versions, version_advice
from tlcapture.models.fast.bridge_components import make_components_fast, offering_only
from tlcapture.models.fast.growing_cache import grow_in_place
from tlcapture.models.fast.linear_modules import make_linears_fast
from tlcapture.models.processes import ProcessRefusedError
from tlcapture.models.sizes import WITHOUT_ATTENTION, Measures, layer_kinds
from tlcapture.models.streams import upload
from tlcapture.shapes import Logits, Mask, Residual, Rows, Tokens
from tlcapture.text import first_line
from tlcapture.version import installed
from tlcapture.views.hooks import HOOKS, POINTS, at_any_layer, hook, is_pattern, layer_hooks

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_WINDOWS = ("sliding_window", "attention_chunk_size", "layer_types")  # of a config, from which caches are made
# Shares of an activation by which rounding may change it in `check`, by the dtype of the weights: some recurrent models
# keep their residual stream in float32. In bfloat16, 24 layers of Mamba or of a hybrid reach half of it; a lost state,
# or padding that is read, gives twice as much or more.
_TOLERANCE, _TOLERANCE_IN_16_BITS = 2e-3, 0.05
_ABOUT_DTYPES = ("dtype", "scalar type")  # in torch's errors about operands that differ in theirs
# Every block that has these holds them as `[batch, pos, d_model]`.
_ALWAYS_PLAIN = {HOOKS[name] for name in (*POINTS, "attn_out", "mixer_out", "mlp_out")}


@dataclass(eq=False)
class _BridgeState:
    mask: Tensor
    past: Any = None


class BridgeModel(Model):
    """A TransformerBridge: the Hugging Face model itself with TransformerLens's hooks.

    Its linear modules become `FastLinear` and its components those of `bridge_components`, unless `TLCAPTURE_FAST=0`.
    """

    engine = "bridge"

    def __init__(self, tl: Any, *args: Any):
        if FAST:
            make_linears_fast(tl)
            make_components_fast(tl)
        super().__init__(tl, *args)

    @property
    def measures(self) -> Measures:
        """The dimensions from the Hugging Face config, since that of TransformerBridge lacks the MLP width of OPT."""
        return Measures.of(self.hf_config)

    @property
    def can_continue_in_pieces(self) -> bool:
        """False with recurrent layers: given several tokens, those of some models (Jamba) start from an empty state."""
        return set(layer_kinds(self.hf_config)) <= _ATTENTION

    def start(self, batch_size: int) -> _BridgeState:
        """An empty state; the first step creates its `past_key_values`, other caches are created here."""
        mask = torch.zeros(batch_size, 0, dtype=torch.long, device=self.device)
        if self._cache_name == "past_key_values" and self._cache_config is self.hf_config:
            return _BridgeState(mask)
        from transformers import DynamicCache

        return _BridgeState(mask, DynamicCache(config=self._cache_config))

    @cached_property
    def _cache_config(self) -> Any:
        """The config without a window of attention that its class does not have.

        The model then ignores the window, but transformers would make a cache that forgets what lies outside it.
        """
        known = type(self.hf_config)()
        stray = [name for name in _WINDOWS if hasattr(self.hf_config, name) and not hasattr(known, name)]
        if not stray:
            return self.hf_config
        config = copy.deepcopy(self.hf_config)
        for name in stray:
            delattr(config, name)
        return config

    @cached_property
    def _cache_name(self) -> str:
        """The argument for the cache, which models without attention (Mamba) name `cache_params`.

        transformers 5.24 has one name for all models, `cache`; `support_newer_transformers` translates both into it.
        """
        arguments = signature(self.tl.original_model.forward).parameters
        is_recurrent = "cache" in arguments and not self.attention_layers
        return "cache_params" if is_recurrent or "cache_params" in arguments else "past_key_values"

    @cached_property
    def hook_names(self) -> Set[str]:
        """Names of all activations that the model can return, with the scores of experts' routers."""
        return recordable_hooks(self.tl.hook_dict, self.n_layers) | self._routers.keys()

    def prepare(self, hooks: Set[str]) -> None:
        """Find out the layouts of these activations."""
        for name in hooks:
            self._layout(name)

    @torch.no_grad()
    def step(
        self, tokens: Tokens, mask: Mask, state: _BridgeState, hooks: Set[str], *, want_logits: bool
    ) -> StepResult:
        """Call `run_with_cache` with position ids that skip left padding; patterns cover all keys so far."""
        laid_out = {name: self._layout(name) for name in hooks}
        state.mask = torch.cat([state.mask, mask.to(self.device)], dim=1)
        positions = (state.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits, cache = self._run(tokens, positions, state, hooks)
        handed_out = {}
        for name, layout in laid_out.items():
            activation = _with_all_keys(name, by_token(cache[name], layout, len(tokens)), state.mask.shape[1])
            handed_out[name] = self._by_head(name, activation)
        return StepResult(logits[:, -1] if want_logits else None, handed_out)

    def _run(
        self, tokens: Tokens, positions: Tokens, state: _BridgeState, hooks: Set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the last position and activations as TransformerLens returns them."""
        # Without attention, the mask is that of the new tokens.
        mask = state.mask if self._cache_name == "past_key_values" else state.mask[:, -tokens.shape[1] :]
        routers = {name: self._routers[name] for name in hooks & self._routers.keys()}
        scores: dict[str, Tensor] = {}
        names = hooks - routers.keys()
        with router_scores(routers, scores), offering_only(self.tl, names):
            (logits, past), cache = self.tl.run_with_cache(
                tokens.to(self.device),
                names_filter=names.__contains__,
                return_cache_object=False,
                return_type="logits_and_cache",
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: state.past},
            )
        state.past = state.past if past is None else past
        if FAST:
            grow_in_place(state.past)
        return logits, {**cache, **scores}

    @cached_property
    def _routers(self) -> dict[str, tuple[Any, int]]:
        """The routers of experts by the name of their scores."""
        return {hook("router_scores", layer): found for layer, found in router_modules(self.tl.original_model).items()}

    def _layout(self, name: str) -> str:
        """The layout of a hook's activation; raises `ModelError` unless it is stored token by token."""
        if is_pattern(name) or at_any_layer(name) in _ALWAYS_PLAIN:
            return PLAIN
        if name not in self._layouts:
            raise ModelError(
                f"{name} of {architecture_of(self.hf_config)} does not lie token by token and cannot be recorded"
            )
        return self._layouts[name]

    @cached_property
    def _layouts(self) -> dict[str, str]:
        names = {name for layer in range(self.n_layers) for name in layer_hooks(layer)} & set(self.hook_names)

        def shapes_of(n_prompts: int, n_tokens: int) -> dict[str, tuple[int, ...]]:
            tokens = torch.ones(n_prompts, n_tokens, dtype=torch.long, device=self.device)
            state = self.start(n_prompts)
            state.mask = torch.ones_like(tokens)
            _, cache = self._run(tokens, tokens.cumsum(dim=1) - 1, state, names)
            return {name: tuple(activation.shape) for name, activation in cache.items()}

        with torch.no_grad():
            return layouts(shapes_of)

    def _by_head(self, name: str, activation: Tensor) -> Tensor:
        """Queries and mixed values with an axis of heads, if the heads' width differs from TransformerLens's config."""
        kind = at_any_layer(name)
        if kind == HOOKS["query"] and getattr(self.tl.cfg, "gated_q_proj", False):
            return activation[..., ::2, :]  # each head's query is followed by its gate
        if kind == HOOKS["mixed_values"] and activation.ndim == 4 and activation.shape[2] != self.n_heads:
            return activation.flatten(2).unflatten(2, (self.n_heads, -1))
        return activation

    def keep(self, state: _BridgeState, rows: Rows) -> None:
        """Drop all rows from the mask and `past_key_values` except `rows`, a boolean mask `[batch]` on the CPU."""
        index = upload(rows.nonzero()[:, 0].tolist(), self.device)
        state.mask = state.mask.index_select(0, index)
        # Also selects the states of recurrent layers, which batch_select_indices leaves as they are.
        state.past.reorder_cache(index)

    def branch(self, state: _BridgeState, rows: Sequence[int]) -> _BridgeState:
        """A new state with copies of the given rows of the mask and `past_key_values`."""
        index = upload(rows, self.device)
        past = copy.deepcopy(state.past)
        if past is not None:
            past.reorder_cache(index)
        return _BridgeState(state.mask[index], past)

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        """Logits `[..., d_vocab]` of a residual stream `[..., d_model]`, with the checkpoint's scale and soft cap."""
        flat = residual.reshape(1, -1, self.d_model).to(self.last_device, self.dtype)
        logits = self.tl.unembed(self.tl.ln_final(flat)).clone()
        if self.logit_scale != 1:
            logits *= self.logit_scale
        soft_cap(logits, getattr(self.hf_config.get_text_config(), "final_logit_softcapping", None))
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    def check(self) -> None:
        """Raise `ModelError` if a required hook is missing or activations would differ from those of Hugging Face."""
        missing = [name for layer in range(self.n_layers) for name in self._missing_hooks(layer)]
        missing += [name for name in ("ln_final", "unembed") if not hasattr(self.tl, name)]
        if missing:
            raise self._refusal(f"TransformerBridge has no {missing[0]} for it")
        last = hook("residual_out", self.n_layers - 1)
        # Rounding in 16 bits grows with depth, but the state of a recurrent layer, or path, shows in no attention.
        is_rounded = self.dtype != torch.float32 and self.with_attention is None
        probed = hook("attn_out", 0) if is_rounded else last
        tokens = torch.arange(1, 7).unsqueeze(0) % self.d_vocab
        whole = self.step(tokens, torch.ones_like(tokens), self.start(1), {probed, last}, want_logits=True)
        assert whole.logits is not None
        tolerance = _TOLERANCE if self.dtype == torch.float32 else _TOLERANCE_IN_16_BITS
        if not _is_close(self.unembed(whole.cache[last][:, -1]), whole.logits, tolerance):
            raise self._refusal(
                "its logits involve more than final norm, unembedding, scale and soft cap, which a logit lens would "
                "silently omit"
            )
        if not _is_close(self._padded_and_in_two_steps(tokens, probed), whole.cache[probed][0], tolerance):
            raise self._refusal(
                "TransformerBridge computes other activations for it token by token in a padded batch than in one "
                f"pass; {version_advice()}"
            )

    def _missing_hooks(self, layer: int) -> list[str]:
        """Required hooks that a layer does not have."""
        needed = [hook("residual_out", layer)]
        if layer in self.attention_layers:
            needed += [hook("attn_out", layer)]
        elif _has_attention(self.hf_config, layer):
            needed += [hook("pattern", layer)]
        elif not any(hook(name, layer) in self.hook_names for name in ("after_attn", "attn_out", "mixer_out")):
            needed += [hook("mixer_out", layer)]
        return [name for name in needed if name not in self.hook_names]

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


def _has_attention(config: Any, layer: int) -> bool:
    """Whether the config of a hybrid does not name a layer as one whose mixer is recurrent or a convolution."""
    kinds = layer_kinds(config)
    return layer >= len(kinds) or kinds[layer] not in WITHOUT_ATTENTION


def _is_close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two activations are equal up to a share of each value and of the largest one.

    Non-finite activations of the model itself are accepted: they do not depend on the architecture, and captures
    report them.
    """
    ours, theirs = ours.float(), theirs.float()
    largest = float(theirs.abs().max())
    return not theirs.isfinite().all() or torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * largest)


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

    register_adapters()
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
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # TransformerLens raises many kinds for what it does not have
        architecture = architecture_of(model.config)
        reason = f"TransformerBridge does not run {architecture}: {_why(error)}"
        raise ModelError(f"{name}: {reason}{_remedy(error, architecture, model.dtype)}") from None
    return bridge


def _has_no_adapter(error: Exception) -> bool:
    return "Could not determine supported architecture" in str(error)


def _remedy(error: Exception, architecture: str, dtype: torch.dtype) -> str:
    """What may help after a failed boot, to end its refusal with; empty where nothing is known to."""
    if isinstance(error, ProcessRefusedError) or (_has_no_adapter(error) and architecture not in ADDED_IN_4):
        return ""
    is_about_dtypes = isinstance(error, RuntimeError) and any(each in str(error) for each in _ABOUT_DTYPES)
    if is_about_dtypes and dtype != torch.float32:
        return f"; {found_versions()}; try --dtype float32"
    return f"; {version_advice()}"


def _why(error: Exception) -> str:
    """The reason of a failed boot, without TransformerLens's list of all architectures that it has."""
    if _has_no_adapter(error):
        return f"TransformerLens {installed('transformer_lens')} has no adapter for it"
    if isinstance(error, AssertionError) and not str(error):
        return f"TransformerLens fails at {extract_tb(error.__traceback__)[-1].line!r}"
    return first_line(error)


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
