"""Loading a model, in the raw basis, and running it step by step: what differs between engines is here.

    model = load_model("smollm2")
    state = model.start(batch_size=1)
    step = model.step(tokens, mask, state, hooks={"blocks.5.hook_resid_post"}, want_logits=True)

`hooked` runs TransformerLens's HookedTransformer, `bridge` its TransformerBridge around the Hugging
Face model. Both name activations alike and leave the weights as the checkpoint has them: nothing
folded, nothing centred, so that every residual equals Hugging Face's at that point.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture import embedded
from tlcapture.checkpoints import cast, fetch, fetch_weights, fingerprint, quiet_loading, source_of
from tlcapture.errors import ModelError
from tlcapture.fast_forward import FastForward, FastState
from tlcapture.hooked_config import architecture_of, covers, hooked_fields, weight_converter
from tlcapture.lazy_model import LazyModel
from tlcapture.measures import Measures
from tlcapture.shapes import LastLogits, Logits, Mask, Residual, Rows, Tokens, Vector
from tlcapture.weight_layout import lay_out, lay_out_in_place, memory_order

ENGINES = ("auto", "hooked", "bridge")
OWN_MARK = "tl-"  # begins the fingerprint of a model that was not loaded here
FAST = os.environ.get("TLCAPTURE_FAST", "1") != "0"  # whether HookedTransformer's blocks go through FastForward
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        return "blocks.0.hook_resid_mid" not in self.hook_names

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

    @contextmanager
    def steered(self, layer: int, addend: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the context, add `addend(activation)` to `residual_out` of a layer in every forward pass."""

        def add(activation: Tensor, hook: Any) -> Tensor:
            return activation + addend(activation).to(activation.device, activation.dtype)

        with self.tl.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            yield

    @abstractmethod
    def unembed(self, residual: Residual) -> Logits:
        """The model's own final norm, unembedding and soft cap, applied to any residual stream."""

    @torch.no_grad()
    def final_norm(self, residual: Residual) -> Residual:
        """The model's own final norm, in float32 and on the device of `residual`."""
        flat = residual.reshape(1, -1, self.d_model).to(self.device, self.dtype)
        return self.tl.ln_final(flat).reshape(residual.shape).to(residual.device, torch.float32)

    def final_norm_gain(self) -> Vector:
        """The final norm's gain, whatever its kind: half the difference of its answers to a vector of
        mean 0 and mean square 1 and to its negative, in which a bias cancels."""
        probe = torch.ones(self.d_model)
        probe[1::2] = -1
        return (self.final_norm(probe) - self.final_norm(-probe)) / 2 * probe


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
            entry.past_keys = entry.past_keys[rows]
            entry.past_values = entry.past_values[rows]
        state.previous_attention_mask = state.previous_attention_mask[rows]

    def branch(self, state: Any, rows: Sequence[int]) -> Any:
        if isinstance(state, FastState):
            return state.branch(rows)
        index = torch.tensor(rows, device=self.device)
        branched = self.start(len(rows))
        # TransformerLens extends its cache by making new tensors: nothing of the old state is written to.
        for entry, origin in zip(branched.entries, state.entries, strict=True):
            entry.past_keys, entry.past_values = origin.past_keys[index], origin.past_values[index]
        branched.previous_attention_mask = state.previous_attention_mask[index]
        return branched

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        from transformer_lens.utilities import apply_softcap

        flat = residual.reshape(1, -1, self.d_model).to(self.device, self.dtype)
        normed = self.tl.ln_final(flat) if self.tl.cfg.normalization_type is not None else flat
        logits = self.tl.unembed(normed)[0] if self._fast is None else self._fast.unembed(normed[0])
        logits = apply_softcap(logits, self.tl.cfg.output_logits_soft_cap)
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])


@dataclass
class _BridgeState:
    mask: Tensor
    past: Any = None


class BridgeModel(Model):
    """TransformerBridge: the Hugging Face model itself, with TransformerLens's hooks around it."""

    engine = "bridge"

    def start(self, batch_size: int) -> _BridgeState:
        return _BridgeState(torch.zeros(batch_size, 0, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def step(self, tokens: Tokens, mask: Mask, state: _BridgeState, hooks: Set[str], *, want_logits: bool) -> Step:
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
        rows = rows.to(self.device)
        state.mask = state.mask[rows]
        state.past.batch_select_indices(rows.nonzero()[:, 0])

    def branch(self, state: _BridgeState, rows: Sequence[int]) -> _BridgeState:
        index = torch.tensor(rows, device=self.device)
        past = copy.deepcopy(state.past)
        if past is not None:
            past.batch_select_indices(index)
        return _BridgeState(state.mask[index], past)

    @torch.no_grad()
    def unembed(self, residual: Residual) -> Logits:
        flat = residual.reshape(1, -1, self.d_model).to(self.device, self.dtype)
        logits = self.tl.unembed(self.tl.ln_final(flat))
        cap = getattr(self.hf_config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits.reshape(*residual.shape[:-1], logits.shape[-1])

    def check(self) -> None:
        """Raise `ModelError` for an architecture whose activations would not be here what they are elsewhere."""
        first, last = "blocks.0.hook_attn_out", f"blocks.{self.n_layers - 1}.hook_resid_post"
        lacking = [name for name in (last, first, "blocks.0.attn.hook_pattern") if name not in self.hook_names]
        lacking += [name for name in ("ln_final", "unembed") if not hasattr(self.tl, name)]
        if lacking:
            raise self._refusal(f"TransformerBridge gives it no {lacking[0]}")
        tokens = torch.arange(1, 7).unsqueeze(0) % self.d_vocab
        whole = self.step(tokens, torch.ones_like(tokens), self.start(1), {first, last}, want_logits=True)
        assert whole.logits is not None
        if not _alike(self.unembed(whole.cache[last][:, -1]), whole.logits):
            raise self._refusal(
                "it does more to its logits than norm, unembedding and soft cap, which a logit lens would silently "
                "leave out"
            )
        if not _alike(self._padded_and_in_two_steps(tokens, first), whole.cache[first][0]):
            raise self._refusal(
                "TransformerBridge computes another attention for it token by token in a padded batch than in one pass"
            )

    def _padded_and_in_two_steps(self, tokens: Tokens, hook: str) -> Tensor:
        """An activation of tokens whose last one follows in a step of its own, beside a longer row."""
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


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two activations are the same but for the rounding of 16 bits."""
    ours, theirs = ours.float(), theirs.float()
    return torch.allclose(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


def _with_all_keys(name: str, activation: Tensor, n_keys: int) -> Tensor:
    """A pattern over all keys so far: Hugging Face drops those that have left a sliding window."""
    missing = n_keys - activation.shape[-1] if name.endswith("hook_pattern") else 0
    return torch.nn.functional.pad(activation, (missing, 0)) if missing else activation


@dataclass(frozen=True)
class ModelOutline:
    """What is known of a model without its weights."""

    tokenizer: Any
    measures: Measures

    @property
    def n_layers(self) -> int:
        return self.measures.n_layers


def outline_model(name: str) -> ModelOutline:
    """Read a model's config and tokenizer; raises `ModelError` where it is not found."""
    with quiet_loading():
        source = source_of(name)
        return ModelOutline(fetch(name, "AutoTokenizer", source), Measures.of(fetch(name, "AutoConfig", source)))


def load_model(
    name: str = embedded.NAME, engine: str = "auto", device: str = "auto", dtype: str = "auto", *, fast: bool = FAST
) -> Model:
    """Load a model on an engine, its weights as the checkpoint has them.

    Args:
        name: `smollm2` (the embedded model), a local folder of Hugging Face weights, or a hub name.
        engine: `hooked`, `bridge`, or `auto`: `hooked` where it covers the architecture.
        device: `cuda`, `mps`, `cpu` (or any torch device), or `auto`: the first of these there is.
        dtype: `float32`, `float16`, `bfloat16`, or `auto`: the checkpoint's own on an accelerator,
            float32 on a CPU.
        fast: whether HookedTransformer's blocks may be computed by `fast_forward`; the environment
            variable `TLCAPTURE_FAST=0` makes this `False` everywhere.

    Raises:
        ModelError: the model is not found, or the engine asked for does not cover it.
    """
    target = pick_device(device)
    with quiet_loading():
        source = source_of(name)
        config = fetch(name, "AutoConfig", source)
        chosen = pick_engine(name, engine, config)
        model = fetch_weights(name, source)
        mark = fingerprint(model)
        cast(model, pick_dtype(dtype, target, config))
        tokenizer = fetch(name, "AutoTokenizer", source)
        return from_hugging_face(model, tokenizer, name=name, engine=chosen, device=str(target), mark=mark, fast=fast)


def from_hugging_face(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    engine: str = "auto",
    device: str = "cpu",
    mark: str | None = None,
    fast: bool = FAST,
) -> Model:
    """The same for a Hugging Face model that is already in memory; its weights may be shared.

    `mark` is the checkpoint's fingerprint, if it was taken before the weights were cast.
    """
    config = model.config
    if not getattr(config, "architectures", None):
        config.architectures = [type(model).__name__]
    engine = pick_engine(name, engine, config)
    model = model.eval().requires_grad_(False)
    common = (tokenizer, config, model.generation_config, name, mark or fingerprint(model))
    with quiet_loading():
        if engine == "hooked":
            return HookedModel(_hooked_transformer(model, tokenizer, name, device), *common, fast=fast)
        from transformer_lens.model_bridge import TransformerBridge

        model.to(device)
        try:
            tl = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=_tokenizer_for(tokenizer, name), device=device, dtype=model.dtype
            )
            bridge = BridgeModel(tl, *common)
            bridge.check()
        except (ModelError, torch.OutOfMemoryError):
            raise
        except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
            reason = f"TransformerBridge does not run {architecture_of(config)}: {_first_line(error)}"
            raise ModelError(f"{name}: {reason}") from None
        return bridge


def from_hooked_transformer(hooked: Any, *, name: str | None = None) -> HookedModel:
    """Take a `HookedTransformer` that somebody else loaded; it must be unprocessed and have a tokenizer.

    Raises `ModelError` for one whose norms were folded into its weights: its basis is another one.
    """
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
    return HookedModel(
        hooked, _without_filled_in_bos(hooked.tokenizer), None, None, name or hooked.cfg.model_name, mark
    )


def as_model(model: Any) -> Model:
    """A `Model` from whatever stands for one: itself, a name to load, a lazy model, or a HookedTransformer."""
    if isinstance(model, Model):
        return model
    if isinstance(model, LazyModel):
        return model.load()
    if isinstance(model, str):
        return load_model(model)
    return from_hooked_transformer(model)


def _steady_context(config: Any, n_ctx: int) -> int:
    """For how many positions a model's rotary frequencies are what they are for one.

    Those of LongRoPE become others for all tokens, and all rows of a batch, once one row is longer than
    the length of pretraining: what a prompt yields would depend on what runs beside it and comes after it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    return min(n_ctx, int(rope["original_max_position_embeddings"])) if rope.get("rope_type") == "longrope" else n_ctx


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _without_filled_in_bos(tokenizer: Any) -> Any:
    """A tokenizer as its checkpoint has it: TransformerLens fills in EOS where there is no BOS."""
    if tokenizer.bos_token != tokenizer.eos_token or tokenizer.init_kwargs.get("bos_token") is not None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.bos_token = None
    return own


def pick_engine(name: str, engine: str, config: Any) -> str:
    """The engine to run a model on; raises `ModelError` for one that does not cover it, with the reason."""
    if engine not in ENGINES:
        raise ModelError(f"no engine {engine!r}: choose one of {', '.join(ENGINES)}")
    reason = covers(config) if engine != "bridge" else None
    if engine == "auto":
        return "bridge" if reason else "hooked"
    if reason:
        raise ModelError(f"engine 'hooked' does not cover {name!r}: {reason}; use --engine bridge")
    return engine


def pick_device(device: str) -> torch.device:
    """The device asked for; `auto` is the first there is. Raises `ModelError` for one that is not there."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """The dtype asked for; `auto` is float32 on a CPU and the checkpoint's own elsewhere."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"no dtype {dtype!r}: choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    own = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" or own is None else own


def _hooked_transformer(model: Any, tokenizer: Any, name: str, device: str) -> Any:
    """A HookedTransformer that takes over the weights of a Hugging Face model, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import fill_missing_keys

    fields = hooked_fields(model.config)
    cfg = HookedTransformerConfig(**fields, model_name=name.split("/")[-1], device=device, dtype=model.dtype)
    hooked = HookedTransformer(cfg, move_to_device=False)
    weights = fill_missing_keys(hooked, weight_converter(model.config)(model, cfg))
    gated = bool(cfg.gated_mlp)
    laid_out = {
        key: lay_out(value.detach().to(device, value.dtype if not value.is_floating_point() else cfg.dtype), order)
        for key, value in weights.items()
        for order in [memory_order(key, value, gated_mlp=gated)]
    }
    # A converter may name biases that the architecture has not; they are zero, or the model is another.
    unexpected = hooked.load_state_dict(laid_out, strict=False, assign=True).unexpected_keys
    if any(laid_out[key].any() for key in unexpected):
        raise ModelError(f"{name}: HookedTransformer has no place for its weights {', '.join(unexpected)}")
    hooked.requires_grad_(False)
    hooked.to(device, print_details=False)
    hooked.set_tokenizer(_tokenizer_for(tokenizer, name))
    return hooked.eval()


def _tokenizer_for(tokenizer: Any, name: str) -> Any:
    """A tokenizer that TransformerLens may keep.

    It fills in missing special tokens, which ours must not have; and it would load the tokenizer once
    more, from wherever it came, were it not told that this one adds BOS.
    """
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", name)
    own.init_kwargs["add_bos_token"] = True
    return own
