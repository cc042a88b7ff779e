"""A HookedTransformer whose own forward pass is FastForward, for the calls that it supports.

Only imported where TransformerLens has HookedTransformer. What differs from it:

- `forward` computes supported calls by FastForward and hands all others to TransformerLens.
- `run_with_cache` is TransformerLens's. The activations that it asks for go to FastForward by name, which puts them
  into the dict that is returned; PyTorch hooks are placed for them only where TransformerLens computes.
- Hooks are removed from the hook points that have any, not from all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
from tlcapture.shapes import Mask

_RETURN_TYPES = (None, "logits", "loss", "both")


class CachingHooks(list[tuple[str, Callable[..., Any]]]):
    """TransformerLens's hooks for a cache, as `(name, function)`, and the dict that they put activations into.

    `plain` says that activations are put there as they are: not moved, cut or relieved of an axis.
    """

    def __init__(self, hooks: list[tuple[str, Callable[..., Any]]], cache: dict[str, Tensor], *, plain: bool):
        super().__init__(hooks)
        self.names = tuple(name for name, _ in hooks)
        self.cache = cache
        self.plain = plain

    @property
    def is_whole(self) -> bool:
        """Whether nobody added hooks to the list, or took any away."""
        return len(self) == len(self.names)


class FastHookedTransformer(HookedTransformer):
    """HookedTransformer with the forward pass of `tlcapture.models.fast`; in all else the same."""

    # Defaults of the class: a model may become one of these after it was made.
    _fast: FastForward | None = None
    _watchers: tuple[CachingHooks, ...] = ()
    _adopts = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what is derived from the weights."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_fast", "_watchers", "_adopts")}

    def look(self) -> FastForward | None:
        """The fast forward pass over the model as it is now, its weights and options; `None` if unsupported."""
        if not FastForward.supports(self):
            return None
        if self._fast is None:
            self._fast = FastForward(self)
        else:
            self._fast.refresh()
        return self._fast

    def start_cache(self, batch_size: int) -> TransformerLensKeyValueCache:
        """An empty cache of keys and values, for FastForward where it supports the model as it is now."""
        kind = FastCache if FastForward.supports(self) else TransformerLensKeyValueCache
        return kind.init_cache(self.cfg, self.embed.W_E.device, batch_size)

    def parts(
        self, mask: Mask, cache: TransformerLensKeyValueCache
    ) -> Iterator[tuple[slice, int, TransformerLensKeyValueCache]]:
        """The rows of a batch of prompts in parts that are run one by one, each with its width and its own cache,
        which is a piece of `cache`, an empty one; all rows at once where FastForward does not support the model."""
        fast = self.look() if isinstance(cache, FastCache) else None
        if fast is None or not isinstance(cache, FastCache) or cache.state is None:
            yield slice(0, len(mask)), mask.shape[1], cache
            return
        cache.computed_by, cache.previous_attention_mask = fast, mask
        for rows, width, state in fast.parts(mask, cache.state):
            yield rows, width, cache.part(rows, state)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
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
        if not isinstance(fwd_hooks, CachingHooks) or not fwd_hooks.is_whole or bwd_hooks or not reset_hooks_end:
            with super().hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
                yield self
            return
        before = self._watchers
        with super().hooks([], [], reset_hooks_end, clear_contexts):
            self._watchers = (*before, fwd_hooks)
            try:
                yield self
            finally:
                self._watchers = before

    def remove_all_hook_fns(
        self, direction: str = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        for point in self.hook_points():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def get_pos_offset(self, past_kv_cache: Any, batch_size: int) -> int:
        if not isinstance(past_kv_cache, FastCache) or past_kv_cache.state is None:
            return super().get_pos_offset(past_kv_cache, batch_size)
        assert len(past_kv_cache.state.mask) == batch_size
        return past_kv_cache.length

    def generate(self, *args: Any, **options: Any) -> Any:
        with self._adopting():
            return super().generate(*args, **options)

    def generate_stream(self, *args: Any, **options: Any) -> Iterator[Any]:
        stream = iter(super().generate_stream(*args, **options))
        while True:
            with self._adopting():
                try:
                    tokens = next(stream)
                except StopIteration:
                    return
            yield tokens

    @contextmanager
    def _adopting(self) -> Iterator[None]:
        """Within the context, empty caches of TransformerLens's that are passed in are made fast ones."""
        before, self._adopts = self._adopts, True
        try:
            yield
        finally:
            self._adopts = before

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
        """TransformerLens's forward pass, with its arguments and results."""
        if self._adopts and type(past_kv_cache) is TransformerLensKeyValueCache and not past_kv_cache.frozen:
            if past_kv_cache.entries[0].past_keys.shape[1] == 0:
                FastCache.adopt(past_kv_cache, self.cfg)
        fast = None
        if (
            return_type in _RETURN_TYPES
            and stop_at_layer in (None, self.cfg.n_layers)
            and shortformer_pos_embed is None
            and tokens is None
        ):
            fast = self._fast_for(input, past_kv_cache)
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            if fast is not None and start_at_layer is None:
                ready = self._tokens_and_mask(input, prepend_bos, padding_side, attention_mask, past_kv_cache)
                if ready is not None:
                    return self._run(fast, None, *ready, past_kv_cache, return_type, loss_per_token, stop_at_layer)
            elif fast is not None and start_at_layer == 0 and return_type == "logits":
                whole = self._whole_mask(input, attention_mask, past_kv_cache)
                if whole is not None:
                    return self._run(fast, input, None, whole, past_kv_cache, "logits", False, stop_at_layer)
        return self._hand_over(
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

    def _fast_for(self, input: Any, cache: Any) -> FastForward | None:
        """What computes a call with this `past_kv_cache`; the model is looked at when a text begins."""
        if isinstance(cache, FastCache):
            if cache.state is None or cache.frozen:
                return None
            if cache.computed_by is None:
                cache.computed_by = self.look()
            fast = cache.computed_by if cache.computed_by is self._fast else None
        else:
            fast = self.look() if cache is None else None
        return None if fast is None or self._needs_gradients(fast, input) else fast

    def _needs_gradients(self, fast: FastForward, input: Any) -> bool:
        if not torch.is_grad_enabled():
            return False
        # What hooks return may ask for gradients, which is only known once it is too late.
        hooked = any(point._forward_hooks or point._backward_hooks for point in self.hook_points())
        return hooked or fast.learns() or (isinstance(input, Tensor) and input.requires_grad)

    def _tokens_and_mask(
        self, input: Any, prepend_bos: Any, padding_side: Any, mask: Tensor | None, cache: FastCache | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Token ids `[batch, pos]` and the mask of all positions so far as `input_to_embed` has them, the mask `None`
        where it makes none; `None` for what TransformerLens is to decide on."""
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
                return tokens, None
            if self.tokenizer is None:
                return None
            with_bos = self.cfg.default_prepend_bos if prepend_bos is USE_DEFAULT_VALUE else prepend_bos
            mask = get_attention_mask(self.tokenizer, tokens, with_bos)
        if mask.shape != tokens.shape or mask.is_floating_point():
            return None
        mask = mask.to(tokens.device)
        return tokens, mask if cache is None else cache.append_attention_mask(mask)

    def _whole_mask(self, residual: Any, mask: Tensor | None, cache: FastCache | None) -> Tensor | None:
        """The mask of all positions so far for a residual stream `[batch, pos, d_model]` before the first block, as
        `generate` passes both; `None` for what TransformerLens is to decide on."""
        if cache is None or not isinstance(residual, Tensor) or residual.ndim != 3 or not _fits(self, residual, cache):
            return None
        shape = (len(residual), cache.length + residual.shape[1])
        if mask is None:
            return torch.ones(shape, dtype=torch.long, device=residual.device)
        return mask.to(residual.device) if mask.shape == shape and not mask.is_floating_point() else None

    def _run(
        self,
        fast: FastForward,
        residual: Tensor | None,
        tokens: Tensor | None,
        mask: Tensor | None,
        cache: FastCache | None,
        return_type: str | None,
        loss_per_token: bool,
        stop_at_layer: int | None,
    ) -> Any:
        """A supported call: from the tokens, or from the residual stream before the first block."""
        given = tokens if residual is None else residual
        assert given is not None
        batch, n_new = given.shape[:2]
        state = FastState.empty(batch, given.device) if cache is None else cache.state
        assert state is not None
        points = self._points()
        whole = torch.ones(batch, n_new, dtype=torch.long, device=given.device) if mask is None else mask.long()
        if residual is None:
            assert tokens is not None
            residual = fast.embed(tokens, state.length, whole, points)
        residual = fast(residual, whole, state, points)
        if stop_at_layer is not None:
            return residual
        if cache is not None and cache.is_adopted and return_type == "logits" and not self._end_is_watched(points):
            residual = residual[:, -1:]  # `generate` reads no other position's logits
        normed = fast.final_norm(residual, points)
        if return_type is None:
            return None
        logits = apply_softcap(fast.logits(normed, points), self.cfg.output_logits_soft_cap)
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, tokens, mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _end_is_watched(self, points: HookPoints) -> bool:
        ends = (self.ln_final.hook_scale, self.ln_final.hook_normalized, self.unembed.hook_in, self.unembed.hook_out)
        return any(points.watches(point) for point in ends)

    def _points(self) -> HookPoints:
        """The hook points, with those who wait for a cache."""
        if not self._watchers:
            return HookPoints(self.hook_dict)
        *others, last = self._watchers
        if not last.plain:
            return HookPoints(self.hook_dict, savers=[pair for each in self._watchers for pair in each])
        return HookPoints(self.hook_dict, last.names, last.cache, [pair for each in others for pair in each])

    def _hand_over(self, input: Any, **options: Any) -> Any:
        """The call computed by TransformerLens, with PyTorch hooks for those who wait for a cache; whoever
        entered `hooks` for them removes them."""
        watchers, self._watchers = self._watchers, ()
        for watcher in watchers:
            for name, hook in watcher:
                self._enable_hook(name, hook, "fwd")
        return super().forward(input, **options)


def _fits(tl: Any, given: Tensor, cache: FastCache | None) -> bool:
    """Whether `[batch, pos, ...]` is not empty, has the rows of the cache and stays within the model's context."""
    batch, n_new = given.shape[:2]
    start = 0 if cache is None else cache.length
    alike = cache is None or (cache.state is not None and len(cache.state.mask) == batch)
    return alike and batch > 0 and n_new > 0 and start + n_new <= tl.cfg.n_ctx
