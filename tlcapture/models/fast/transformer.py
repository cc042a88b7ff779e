"""A HookedTransformer that uses FastForward for the calls that it supports.

Import it only if TransformerLens has HookedTransformer. The differences from HookedTransformer:

- `forward` computes supported calls with FastForward and all others with TransformerLens.
- `run_with_cache` is TransformerLens's. FastForward stores the requested activations directly in the returned
  dict; PyTorch hooks are added for them only if TransformerLens computes the call.
- Hooks are removed only from the hook points that have some.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.HookedTransformer import Output
from transformer_lens.utilities import (
    USE_DEFAULT_VALUE,
    LocallyOverridenDefaults,
    Slice,
    apply_softcap,
    get_attention_mask,
)

from tlcapture.models.fast.cache import FastCache
from tlcapture.models.fast.forward import FastForward
from tlcapture.models.fast.layers import HookPoints
from tlcapture.models.fast.state import FastState
from tlcapture.models.recordable_hooks import RecordableHooks
from tlcapture.shapes import Mask

_RETURN_TYPES = (None, "logits", "loss", "both")


class CachingHooks(list[tuple[str, Callable[..., Any]]]):
    """TransformerLens's hooks for an activation cache: a list of `(name, function)`.

    Attributes:
        names: the names of the original hooks.
        cache: the dict in which the hooks store activations.
        plain: whether activations are stored unchanged, i.e. not moved to a device, sliced or squeezed.
    """

    def __init__(self, hooks: list[tuple[str, Callable[..., Any]]], cache: dict[str, Tensor], *, plain: bool):
        super().__init__(hooks)
        self.names = tuple(name for name, _ in hooks)
        self.cache = cache
        self.plain = plain

    @property
    def is_unchanged(self) -> bool:
        """Whether no hooks were added to or removed from the list."""
        return len(self) == len(self.names)


class _Call(NamedTuple):
    """A call that FastForward can run.

    Attributes:
        given: token ids `[batch, pos]`, or the residual stream before the first block, `[batch, pos, d_model]`.
        mask: 0 where positions so far are padded, else 1, `[batch, key]`; `None` if TransformerLens computes none.
        cache: keys and values so far, if the call has a cache.
    """

    given: Tensor
    mask: Tensor | None
    cache: FastCache | None


class FastHookedTransformer(HookedTransformer):
    """A HookedTransformer with the forward pass of `tlcapture.models.fast` and otherwise unchanged behaviour."""

    # Class attributes, since an existing HookedTransformer may be converted by assigning its class.
    _fast: FastForward | None = None
    _caching_hooks: tuple[CachingHooks, ...] = ()
    _recordable: tuple[RecordableHooks, ...] = ()
    _converts_caches = False

    def __getstate__(self) -> dict[str, Any]:
        """The attributes for copies and pickles, without those derived from the weights."""
        derived = ("_fast", "_caching_hooks", "_recordable", "_converts_caches")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def fast_forward(self) -> FastForward | None:
        """The fast forward pass for the current weights and options of the model; `None` if they are not supported."""
        if not FastForward.supports(self):
            return None
        if self._fast is None:
            self._fast = FastForward(self)
        else:
            self._fast.refresh()
        return self._fast

    def start_cache(self, batch_size: int) -> TransformerLensKeyValueCache:
        """An empty `past_kv_cache`: a FastCache if FastForward supports the model, else that of TransformerLens."""
        kind = FastCache if FastForward.supports(self) else TransformerLensKeyValueCache
        return kind.init_cache(self.cfg, self.embed.W_E.device, batch_size)

    @property
    def is_hooked(self) -> bool:
        """Whether others see a call of `run_with_cache`: hooks, or a method that replaces its own or `forward`."""
        methods = (self.run_with_cache, self.forward)
        is_replaced = [getattr(method, "__func__", None) for method in methods] != [*_METHODS]
        return is_replaced or bool(self._caching_hooks) or any(map(_has_hooks, self.hook_dict.values()))

    @property
    def recordable_key(self) -> tuple[Hashable, ...]:
        """The keys of the recordable hooks that are on."""
        return tuple(each.key for each in self._recordable)

    def micro_batches(
        self, mask: Mask, cache: TransformerLensKeyValueCache
    ) -> Iterator[tuple[slice, int, TransformerLensKeyValueCache]]:
        """Split a batch of left-padded prompts into micro-batches, or yield all rows if FastForward is not supported.

        Args:
            mask: 0 where the prompts are padded, else 1, `[batch, pos]`.
            cache: the empty cache of the batch.

        Yields:
            The rows of each micro-batch, the length of its longest prompt, and its cache, a view of `cache`.
        """
        fast = self.fast_forward() if isinstance(cache, FastCache) else None
        if fast is None or not isinstance(cache, FastCache) or cache.state is None:
            yield slice(0, len(mask)), mask.shape[1], cache
            return
        cache.computed_by, cache.previous_attention_mask = fast, mask
        for rows, width, state in fast.micro_batches(mask, cache.state):
            yield rows, width, cache.micro_batch(rows, state)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """TransformerLens's cache, forward and backward hooks; forward hooks are `CachingHooks`."""
        if isinstance(names_filter, list):
            names_filter = frozenset(names_filter).__contains__
        pos_slice = Slice.unwrap(pos_slice)
        kept, forward, backward = super().get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, pos_slice
        )
        plain = device is None and not remove_batch_dim and pos_slice.mode == "identity"
        return kept, CachingHooks(forward, kept, plain=plain), backward

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """TransformerLens's context of temporary hooks.

        Unchanged `CachingHooks` and `RecordableHooks` are passed to FastForward instead.
        """
        before = self._recordable, self._caching_hooks
        own: Any = fwd_hooks
        if not bwd_hooks and reset_hooks_end:
            if isinstance(fwd_hooks, RecordableHooks):
                own, self._recordable = [], (*self._recordable, fwd_hooks)
            elif isinstance(fwd_hooks, CachingHooks) and fwd_hooks.is_unchanged:
                own, self._caching_hooks = [], (*self._caching_hooks, fwd_hooks)
        try:
            with super().hooks(own, bwd_hooks, reset_hooks_end, clear_contexts):
                yield self
        finally:
            self._recordable, self._caching_hooks = before

    def remove_all_hook_fns(
        self, direction: str = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hooks as TransformerLens does, but visit only the hook points that have some."""
        for point in self.hook_points():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def get_pos_offset(self, past_kv_cache: Any, batch_size: int) -> int:
        """The number of positions in the cache, without converting a FastCache to TransformerLens's format."""
        if not isinstance(past_kv_cache, FastCache) or past_kv_cache.state is None:
            return super().get_pos_offset(past_kv_cache, batch_size)
        assert len(past_kv_cache.state.mask) == batch_size
        return past_kv_cache.length

    def generate(self, *args: Any, **options: Any) -> Any:
        """TransformerLens's `generate`, with the cache that it creates converted to a FastCache."""
        with self._converting_caches():
            return super().generate(*args, **options)

    def generate_stream(self, *args: Any, **options: Any) -> Iterator[Any]:
        """TransformerLens's `generate_stream`, with the cache that it creates converted to a FastCache."""
        stream = iter(super().generate_stream(*args, **options))
        while True:
            with self._converting_caches():
                try:
                    tokens = next(stream)
                except StopIteration:
                    return
            yield tokens

    @contextmanager
    def _converting_caches(self) -> Iterator[None]:
        """Convert empty TransformerLens caches passed to `forward` to FastCaches while the context is active."""
        before, self._converts_caches = self._converts_caches, True
        try:
            yield
        finally:
            self._converts_caches = before

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: Any = USE_DEFAULT_VALUE,
        padding_side: Any = USE_DEFAULT_VALUE,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        shortformer_pos_embed: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
    ) -> Any:
        """TransformerLens's forward pass with its arguments and results; FastForward runs supported calls."""
        if self._converts_caches and type(past_kv_cache) is TransformerLensKeyValueCache and not past_kv_cache.frozen:
            if past_kv_cache.entries[0].past_keys.shape[1] == 0:
                FastCache.convert(past_kv_cache, self.cfg)
        fast = None
        if (
            return_type in _RETURN_TYPES
            and stop_at_layer in (None, self.cfg.n_layers)
            and shortformer_pos_embed is None
            and tokens is None
        ):
            fast = self._fast_forward_for(input, past_kv_cache)
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            call = None
            if fast is not None and start_at_layer is None:
                call = self._call_from_tokens(input, prepend_bos, padding_side, attention_mask, past_kv_cache)
            elif fast is not None and start_at_layer == 0 and return_type == "logits":
                call = self._call_from_residual(input, attention_mask, past_kv_cache)
            if fast is not None and call is not None:
                return self._run(fast, call, return_type, loss_per_token, stop_at_layer)
        return self._transformer_lens_forward(
            input,
            return_type=return_type,
            loss_per_token=loss_per_token,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            start_at_layer=start_at_layer,
            tokens=tokens,
            shortformer_pos_embed=shortformer_pos_embed,
            attention_mask=attention_mask,
            stop_at_layer=stop_at_layer,
            past_kv_cache=past_kv_cache,
        )

    def _fast_forward_for(self, input: Any, cache: Any) -> FastForward | None:
        """The FastForward for a call, refreshed unless the cache has positions; `None` for TransformerLens."""
        if isinstance(cache, FastCache):
            if cache.state is None or cache.frozen:
                return None
            if cache.computed_by is None:
                cache.computed_by = self.fast_forward()
            fast = cache.computed_by if cache.computed_by is self._fast else None
        else:
            fast = self.fast_forward() if cache is None else None
        return None if fast is None or self._needs_gradients(fast, input) else fast

    def _needs_gradients(self, fast: FastForward, input: Any) -> bool:
        if not torch.is_grad_enabled():
            return False
        # Hooks may return tensors that require gradients, which is only known after they ran.
        hooked = any(point._forward_hooks or point._backward_hooks for point in self.hook_points())
        return hooked or fast.requires_grad() or (isinstance(input, Tensor) and input.requires_grad)

    def _call_from_tokens(
        self, input: Any, prepend_bos: Any, padding_side: Any, mask: Tensor | None, cache: FastCache | None
    ) -> _Call | None:
        """A call with token ids or texts and its mask, as in TransformerLens's `input_to_embed`.

        The result is `None` if TransformerLens must run the call.
        """
        if isinstance(input, Tensor):
            tokens = input
        elif self.tokenizer is not None and isinstance(input, (str, list)):
            tokens = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        else:
            return None
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or not _fits(self, tokens, cache) or tokens.is_floating_point():
            return None
        tokens = tokens.to(self.embed.W_E.device)
        if mask is None:
            if cache is None and not (self.tokenizer and self.tokenizer.padding_side == "left"):
                return _Call(tokens, None, None)
            if self.tokenizer is None:
                return None
            with_bos = self.cfg.default_prepend_bos if prepend_bos is USE_DEFAULT_VALUE else prepend_bos
            mask = get_attention_mask(self.tokenizer, tokens, with_bos)
        if mask.shape != tokens.shape or mask.is_floating_point():
            return None
        mask = mask.to(tokens.device)
        return _Call(tokens, mask if cache is None else cache.append_attention_mask(mask), cache)

    def _call_from_residual(self, residual: Any, mask: Tensor | None, cache: FastCache | None) -> _Call | None:
        """A call with the residual stream `[batch, pos, d_model]` before the first block and the mask of all positions.

        `generate` passes both. The result is `None` if TransformerLens must run the call.
        """
        if cache is None or not isinstance(residual, Tensor) or residual.ndim != 3 or not _fits(self, residual, cache):
            return None
        shape = (len(residual), cache.length + residual.shape[1])
        if mask is None:
            mask = torch.ones(shape, dtype=torch.long, device=residual.device)
        elif mask.shape != shape or mask.is_floating_point():
            return None
        return _Call(residual, mask.to(residual.device), cache)

    def _run(
        self, fast: FastForward, call: _Call, return_type: str | None, loss_per_token: bool, stop_at_layer: int | None
    ) -> Any:
        """Compute a supported call."""
        given, mask, cache = call
        state = FastState.empty(len(given), given.device) if cache is None else cache.state
        assert state is not None
        points = self._points()
        if mask is None:
            step = fast.begin(torch.ones(given.shape[:2], dtype=torch.long, device=given.device), state)
        else:
            step = fast.begin(mask.long(), state)
        residual = fast.embed(given, step, points) if given.ndim == 2 else given
        residual = fast(residual, step, state, points)
        if stop_at_layer is not None:
            return residual
        is_of_generate = cache is not None and cache.is_converted and return_type == "logits"
        if is_of_generate and not self._has_hooks_after_blocks(points):
            residual = residual[:, -1:]  # only whose logits are used
        normed = fast.final_norm(residual, points)
        if return_type is None:
            return None
        logits = apply_softcap(fast.logits(normed, points), self.cfg.output_logits_soft_cap)
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, given, mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _has_hooks_after_blocks(self, points: HookPoints) -> bool:
        ends = (self.ln_final.hook_scale, self.ln_final.hook_normalized, self.unembed.hook_in, self.unembed.hook_out)
        return any(points.is_used(point) for point in ends)

    def _points(self) -> HookPoints:
        """The hook points, with the activations that enclosing `run_with_cache` calls requested."""
        changes = [pair for each in self._recordable for pair in each]
        if not self._caching_hooks:
            return HookPoints(self.hook_dict, changes=changes)
        *outer, last = self._caching_hooks
        if not last.plain:
            pairs = [pair for each in self._caching_hooks for pair in each]
            return HookPoints(self.hook_dict, caching_hooks=pairs, changes=changes)
        pairs = [pair for each in outer for pair in each]
        return HookPoints(self.hook_dict, last.names, last.cache, pairs, changes)

    def _transformer_lens_forward(self, input: Any, **options: Any) -> Any:
        """Compute a call with TransformerLens; what FastForward calls become PyTorch hooks until `hooks` ends."""
        requested = (*self._recordable, *self._caching_hooks)
        self._recordable, self._caching_hooks = (), ()
        for hooks in requested:
            for name, hook in hooks:
                self._enable_hook(name, hook, "fwd")
        return super().forward(input, **options)


_METHODS = (FastHookedTransformer.run_with_cache, FastHookedTransformer.forward)


def _has_hooks(point: Any) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)


def _fits(tl: Any, given: Tensor, cache: FastCache | None) -> bool:
    """Whether `[batch, pos, ...]` is not empty, has the batch size of the cache and fits the model's context."""
    batch, n_new = given.shape[:2]
    start = 0 if cache is None else cache.length
    same_batch = cache is None or (cache.state is not None and len(cache.state.mask) == batch)
    return same_batch and batch > 0 and n_new > 0 and start + n_new <= tl.cfg.n_ctx
