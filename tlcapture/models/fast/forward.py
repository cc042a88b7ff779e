"""The blocks of a HookedTransformer, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlcapture.models.fast.layers import HookPoints, Layer, Norm
from tlcapture.models.fast.products import linear, wide_linear
from tlcapture.models.fast.state import FastState, Step
from tlcapture.shapes import Logits, Mask, MaskSoFar, Residual, Tokens

# Positions of prompts that are computed together: more are no faster, and what lies between two products
# then leaves the caches, and soon takes fresh pages of memory at every product.
_PART = {"cpu": 1024}
_PART_ELSEWHERE = 2**14


class FastForward:
    """Computes what a `HookedTransformer` computes: embedding, blocks, logits; `supports` says of which."""

    def __init__(self, tl: Any):
        self._tl = tl
        self.refresh()

    def __deepcopy__(self, memo: Any) -> FastForward:
        """Itself: whoever copies keys and values does not mean the model that computed them."""
        return self

    @staticmethod
    def supports(tl: Any) -> bool:
        """Whether the model is one of those computed here, with TransformerLens's options as they are now."""
        from transformer_lens.components import (
            MLP,
            Attention,
            GatedMLP,
            GroupedQueryAttention,
            LayerNorm,
            RMSNorm,
            Unembed,
        )

        cfg = tl.cfg
        foreign = (
            cfg.use_attn_result,
            cfg.use_attn_in,
            cfg.use_split_qkv_input,
            cfg.use_hook_mlp_in,
            getattr(cfg, "use_hook_tokens", False),
            getattr(cfg, "load_in_4bit", False),
            cfg.attn_only,
            cfg.ungroup_grouped_query_attention,
            cfg.n_devices > 1,
            cfg.attention_dir != "causal",
            cfg.positional_embedding_type not in ("standard", "rotary"),
            cfg.normalization_type not in ("LN", "RMS"),
            cfg.is_layer_norm_activation(),
            getattr(cfg, "clip_qkv", None) is not None,
            getattr(cfg, "use_attention_sinks", False),
            getattr(cfg, "use_logn_attn", False),
            getattr(cfg, "use_dynamic_ntk_rope", False),
            str(cfg.original_architecture).startswith("Olmo"),
            # Products and attention of pieces of a buffer were wrong there in several versions of torch.
            tl.embed.W_E.device.type == "mps",
            _are_watched(tl),
        )
        plain = type(tl.ln_final) in (LayerNorm, RMSNorm) and type(tl.unembed) is Unembed
        plain = plain and all(
            type(block.attn) in (Attention, GroupedQueryAttention) and type(block.mlp) in (MLP, GatedMLP)
            for block in tl.blocks
        )
        return plain and not any(foreign)

    @torch.no_grad()
    def refresh(self) -> None:
        """Look at the model's modules, options and weights again, as somebody may have changed them since."""
        tl, cfg = self._tl, self._tl.cfg
        self._n_heads = int(cfg.n_heads)
        self._n_kv_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self._shape = (int(cfg.n_layers), self._n_kv_heads, int(cfg.d_head))
        self._rotary = cfg.positional_embedding_type == "rotary"
        self._layers = [Layer(block) for block in tl.blocks]
        self._final_norm = Norm(tl.ln_final)
        self._parameters = list(tl.parameters())

    def learns(self) -> bool:
        """Whether any of the model's weights asks for gradients."""
        return any(weight.requires_grad for weight in self._parameters)

    def parts(self, mask: Mask, state: FastState) -> Iterator[tuple[slice, int, FastState]]:
        """The rows of a batch of prompts in parts of so few positions that what is computed in between stays
        small, each with the width of its longest prompt and a state that is a piece of `state`."""
        batch, whole = mask.shape
        state.mask = mask
        store = state.reserve(whole, self._shape, self._tl.embed.W_E)
        lengths = mask.sum(dim=1).tolist()
        most = _PART.get(mask.device.type, _PART_ELSEWHERE)
        start = 0
        while start < batch:
            stop = start + 1
            while stop < batch and (stop + 1 - start) * max(lengths[start : stop + 1]) <= most:
                stop += 1
            width = max(lengths[start:stop])
            # Masked positions are multiplied by zero, which only numbers survive.
            store[:, :, start:stop, :, : whole - width] = 0
            piece = store[:, :, start:stop, :, whole - width :]
            yield slice(start, stop), width, FastState(mask[start:stop, :0], piece)
            start = stop

    def embed(self, tokens: Tokens, start: int, mask: MaskSoFar, points: HookPoints) -> Residual:
        """The residual stream before the first block, `[batch, pos, d_model]`, of tokens at the positions from `start`
        on; `mask` is that of all positions so far."""
        tl = self._tl
        residual = points.pass_through(tl.hook_embed, tl.embed(tokens))
        if not self._rotary:
            residual = residual + points.pass_through(tl.hook_pos_embed, tl.pos_embed(tokens, start, mask))
        return residual

    def __call__(self, residual: Residual, mask: MaskSoFar, state: FastState, points: HookPoints) -> Residual:
        """The residual stream after the last block, from that before the first, `[batch, pos, d_model]`; `mask`
        is that of all positions so far, up to which `state` is extended."""
        start, state.mask = state.length, mask
        step = Step(
            mask,
            start,
            state.length,
            self._n_heads // self._n_kv_heads,
            residual.dtype,
            self._tl.cfg.window_size,
            padded=not bool(mask.all()),
        )
        store = state.reserve(state.length, self._shape, residual)
        for layer, keys_and_values in zip(self._layers, store.unbind(), strict=True):
            residual = self._block(layer, residual, step, keys_and_values, points)
        return residual

    def final_norm(self, residual: Residual, points: HookPoints) -> Residual:
        return points.norm(self._final_norm, residual)

    def logits(self, normed: Residual, points: HookPoints) -> Logits:
        """`[batch, pos, d_vocab]`, from the output of the final norm."""
        unembed = self._tl.unembed
        logits = _unembedded(unembed, points.pass_through(unembed.hook_in, normed))
        return points.pass_through(unembed.hook_out, logits)

    def keys_and_values(self, state: FastState) -> list[tuple[Tensor, Tensor]]:
        """Those of each layer as TransformerLens keeps them, `[batch, pos, n_kv_heads, d_head]`: keys before they
        are rotated."""
        assert state.store is not None
        step = Step(state.mask, 0, state.length, 1, state.store.dtype, None, padded=True)
        found = []
        for layer, pair in zip(self._layers, state.store[..., : state.length, :].unbind(), strict=True):
            keys, values = (each.transpose(1, 2) for each in pair.unbind())
            if self._rotary:
                cos, sin, adjacent_pairs = self._rotation(layer, step)
                keys = _rotate(keys.to(cos.dtype), cos, -sin, adjacent_pairs).to(values.dtype)
            found.append((keys.clone(), values.clone()))
        return found

    def _block(self, layer: Layer, residual: Tensor, step: Step, store: Tensor, points: HookPoints) -> Tensor:
        fire = points.pass_through
        residual = fire(layer.hook_resid_pre, residual)
        attn_out = self._attention(layer, points.norm(layer.ln1, residual), step, store, points)
        if layer.ln1_post is not None:
            attn_out = points.norm(layer.ln1_post, attn_out)
        behind = residual + fire(layer.hook_attn_out, attn_out)
        if layer.hook_resid_mid is not None:
            residual = behind = fire(layer.hook_resid_mid, behind)
        mlp_out = self._mlp(layer, points.norm(layer.ln2, residual), points)
        if layer.ln2_post is not None:
            mlp_out = points.norm(layer.ln2_post, mlp_out)
        return fire(layer.hook_resid_post, behind + fire(layer.hook_mlp_out, mlp_out))

    def _mlp(self, layer: Layer, x: Tensor, points: HookPoints) -> Tensor:
        fire = points.pass_through
        if layer.mlp_gate is None:
            post = layer.activate(fire(layer.hook_pre, linear(x, *layer.mlp_in)))
        else:
            pre = fire(layer.hook_pre, linear(x, layer.mlp_gate))
            pre_linear = fire(layer.hook_pre_linear, linear(x, layer.mlp_in[0]))
            post = layer.activate(pre)
            post = post.mul_(pre_linear) if layer.activates_anew else post * pre_linear
            if layer.mlp_in[1] is not None:
                post += layer.mlp_in[1]
        return linear(fire(layer.hook_post, post), *layer.mlp_out)

    def _attention(self, layer: Layer, x: Tensor, step: Step, store: Tensor, points: HookPoints) -> Tensor:
        fire, attn = points.pass_through, layer.attn
        batch, n_queries, _ = x.shape
        heads, kv_heads, d_head = self._n_heads, self._n_kv_heads, self._shape[2]
        q = fire(layer.hook_q, linear(x, *layer.query).view(batch, n_queries, heads, d_head))
        k = fire(layer.hook_k, linear(x, *layer.key).view(batch, n_queries, kv_heads, d_head))
        v = fire(layer.hook_v, linear(x, *layer.value).view(batch, n_queries, kv_heads, d_head))
        if layer.qk_norms is not None:
            q, k = (points.norm(norm, each) for norm, each in zip(layer.qk_norms, (q, k), strict=True))
        if self._rotary:
            rotation = self._rotation(layer, step)
            q, k = fire(layer.hook_rot_q, _rotate(q, *rotation)), _rotate(k, *rotation)
        keys, values = store[..., : step.stop, :].unbind()
        keys[:, :, step.start :] = k.transpose(1, 2)
        values[:, :, step.start :] = v.transpose(1, 2)
        if self._rotary and points.watches(layer.hook_rot_k):
            # A copy, since the store is written to again.
            keys = fire(layer.hook_rot_k, keys.transpose(1, 2).clone()).transpose(1, 2)
        q = q.transpose(1, 2)
        # Queries whose heads share keys lie behind each other, as if they were more positions.
        together = q.reshape(batch, kv_heads, -1, d_head)
        if layer.cap > 0 or points.watches(layer.hook_pattern) or points.watches(layer.hook_attn_scores):
            z = self._watched(layer, together, keys, values, step, points)
        elif step.is_causal(layer.kind):
            z = functional.scaled_dot_product_attention(
                q, keys, values, is_causal=True, enable_gqa=True, scale=1 / attn.attn_scale
            )
        else:
            z = functional.scaled_dot_product_attention(
                together, keys, values, attn_mask=step.bias(layer.kind), scale=1 / attn.attn_scale
            )
        z = z.reshape(batch, heads, n_queries, d_head)
        blind = step.blind(layer.kind)
        z = fire(layer.hook_z, (z if blind is None else z.masked_fill(blind, 0)).transpose(1, 2))
        return linear(z.reshape(batch, n_queries, -1).to(layer.out[0].dtype), *layer.out)

    def _watched(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor, step: Step, points: HookPoints) -> Tensor:
        """Attention with its scores and its pattern to be seen; softmax in float32, as Hugging Face has it."""
        # Divided before they are multiplied: numbers of 16 bits overflow later.
        scores = q / layer.attn.attn_scale @ keys.transpose(-1, -2)
        if layer.cap > 0:
            scores = torch.tanh(scores / layer.cap) * layer.cap
        scores = scores.view(len(q), self._n_heads, -1, step.stop)
        seen = step.allowed(layer.kind)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        scores = points.pass_through(layer.hook_attn_scores, scores)
        pattern = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        if seen is not None and step.padded:
            pattern = pattern.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)  # padding sees nothing
        pattern = points.pass_through(layer.hook_pattern, pattern)
        return pattern.to(values.dtype).reshape(*q.shape[:3], step.stop) @ values

    def _rotation(self, layer: Layer, step: Step) -> tuple[Tensor, Tensor, bool]:
        """Cosines and signed sines `[batch, pos, 1, rotary_dim]` at the positions of a step."""
        if layer.kind not in step.rotations:
            attn, cfg = layer.attn, layer.attn.cfg
            if attn.rotary_cos.shape[0] < step.stop:
                attn._extend_rotary_embeddings(min(cfg.n_ctx, max(step.stop, 2 * attn.rotary_cos.shape[0])))
            positions = (step.mask.cumsum(dim=1) - 1).clamp(min=0)[:, step.start :]
            cos, sin = attn.rotary_cos[positions, None], attn.rotary_sin[positions, None]
            if cfg.rotary_adjacent_pairs:
                sin[..., ::2].neg_()
            else:
                sin[..., : sin.shape[-1] // 2].neg_()
            step.rotations[layer.kind] = (cos, sin, bool(cfg.rotary_adjacent_pairs))
        return step.rotations[layer.kind]


def unembed(module: Any, normed: Tensor) -> Tensor:
    """What TransformerLens's `Unembed` makes of `[pos, d_model]`, in a tensor that nobody else holds."""
    if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
        return module(normed[None])[0].clone()  # they may hold it
    return _unembedded(module, normed)


def _unembedded(module: Any, normed: Tensor) -> Tensor:
    """`W_U` and `b_U` applied to `[..., d_model]`."""
    logits = wide_linear(normed.flatten(0, -2), module.W_U.T).view(*normed.shape[:-1], module.W_U.shape[1])
    # An accelerator adds zeros sooner than it tells whether they are.
    return logits.add_(module.b_U) if normed.is_cuda or module.b_U.any() else logits


def _are_watched(tl: Any) -> bool:
    """Whether somebody hooked a module itself rather than a hook point: it is not called here, its parts are."""
    from transformer_lens.hook_points import HookPoint

    return any(
        module._forward_pre_hooks or (module._forward_hooks and not isinstance(module, HookPoint))
        for module in [tl, *tl.blocks.modules(), *tl.ln_final.modules(), *tl.unembed.modules()]
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """Rotary embedding of `[batch, pos, head, d_head]`: of the first `rotary_dim` numbers of a head."""
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if adjacent_pairs else turned.roll(width // 2, -1)
    rotated = torch.addcmul(turned * cos, swapped, sin)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)
