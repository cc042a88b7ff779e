"""The fast forward pass through the blocks of a HookedTransformer."""

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

# The most prompt positions per micro-batch. On a CPU, more are no faster: intermediate tensors no longer fit into the
# caches, and above some size the allocator maps new memory pages for each of them.
_MAX_POSITIONS = {"cpu": 1024}
_MAX_POSITIONS_OF_OTHER_DEVICES = 2**14


def most_positions(device: torch.device) -> int:
    """The most prompt positions of a micro-batch on a device, unless one prompt has more."""
    return _MAX_POSITIONS.get(device.type, _MAX_POSITIONS_OF_OTHER_DEVICES)


class FastForward:
    """Computes embedding, blocks and logits of the HookedTransformers for which `supports` is true."""

    def __init__(self, tl: Any):
        self._tl = tl
        self.refresh()

    def __deepcopy__(self, memo: Any) -> FastForward:
        """Return this object itself, so that a copy of a cache does not copy the model that computed it."""
        return self

    @staticmethod
    def supports(tl: Any) -> bool:
        """Whether FastForward can run the model with its current TransformerLens options and module hooks."""
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
        unsupported = (
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
            # Several versions of torch compute wrong products and attention from views of a buffer on MPS.
            tl.embed.W_E.device.type == "mps",
            _has_module_hooks(tl),
        )
        has_known_modules = type(tl.ln_final) in (LayerNorm, RMSNorm) and type(tl.unembed) is Unembed
        has_known_modules = has_known_modules and all(
            type(block.attn) in (Attention, GroupedQueryAttention) and type(block.mlp) in (MLP, GatedMLP)
            for block in tl.blocks
        )
        return has_known_modules and not any(unsupported)

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's modules, options and weights again, which may have been changed."""
        tl, cfg = self._tl, self._tl.cfg
        self._n_heads = int(cfg.n_heads)
        self._n_kv_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self._shape = (int(cfg.n_layers), self._n_kv_heads, int(cfg.d_head))
        self._rotary = cfg.positional_embedding_type == "rotary"
        self._layers = [Layer(block) for block in tl.blocks]
        self._final_norm = Norm(tl.ln_final)
        self._parameters = list(tl.parameters())

    def requires_grad(self) -> bool:
        """Whether any of the model's weights requires gradients."""
        return any(weight.requires_grad for weight in self._parameters)

    def micro_batches(self, mask: Mask, state: FastState) -> Iterator[tuple[slice, int, FastState]]:
        """Split a batch of left-padded prompts into micro-batches whose intermediate tensors stay small.

        Args:
            mask: 0 where the prompts are padded, else 1, `[batch, pos]`.
            state: the empty state of the batch.

        Yields:
            The rows of each micro-batch, the length of its longest prompt, and its state, a view of `state`.
        """
        batch, n_positions = mask.shape
        state.mask = mask
        store = state.reserve(n_positions, self._shape, self._tl.embed.W_E)
        lengths = mask.sum(dim=1).tolist()
        max_positions = most_positions(mask.device)
        start = 0
        while start < batch:
            stop = start + 1
            while stop < batch and (stop + 1 - start) * max(lengths[start : stop + 1]) <= max_positions:
                stop += 1
            width = max(lengths[start:stop])
            # Attention multiplies masked positions by zero, which gives NaN if the memory holds NaN or inf.
            store[:, :, start:stop, :, : n_positions - width] = 0
            view = store[:, :, start:stop, :, n_positions - width :]
            yield slice(start, stop), width, FastState(mask[start:stop, :0], view)
            start = stop

    def embed(self, tokens: Tokens, start: int, mask: MaskSoFar, points: HookPoints) -> Residual:
        """The residual stream before the first block, `[batch, pos, d_model]`.

        Args:
            tokens: token ids `[batch, pos]` at the positions from `start` on.
            mask: the mask of all positions so far, including those of `tokens`.
        """
        tl = self._tl
        residual = points.pass_through(tl.hook_embed, tl.embed(tokens))
        if not self._rotary:
            residual = residual + points.pass_through(tl.hook_pos_embed, tl.pos_embed(tokens, start, mask))
        return residual

    def __call__(self, residual: Residual, mask: MaskSoFar, state: FastState, points: HookPoints) -> Residual:
        """The residual stream after the last block, `[batch, pos, d_model]`.

        Args:
            residual: the residual stream before the first block at the new positions, `[batch, pos, d_model]`.
            mask: the mask of all positions so far, including the new ones.
            state: keys and values so far; those of the new positions are appended.
            points: calls hooks and keeps activations.
        """
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
        """The output of the final norm, `[batch, pos, d_model]`."""
        return points.norm(self._final_norm, residual)

    def logits(self, normed: Residual, points: HookPoints) -> Logits:
        """Logits `[batch, pos, d_vocab]` of the output of the final norm, without soft cap."""
        unembed = self._tl.unembed
        logits = _unembedded(unembed, points.pass_through(unembed.hook_in, normed))
        return points.pass_through(unembed.hook_out, logits)

    def keys_and_values(self, state: FastState) -> list[tuple[Tensor, Tensor]]:
        """Unrotated keys, and values, of each layer in TransformerLens's format, `[batch, pos, n_kv_heads, d_head]`."""
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
        after = residual + fire(layer.hook_attn_out, attn_out)
        if layer.hook_resid_mid is not None:
            residual = after = fire(layer.hook_resid_mid, after)
        mlp_out = self._mlp(layer, points.norm(layer.ln2, residual), points)
        if layer.ln2_post is not None:
            mlp_out = points.norm(layer.ln2_post, mlp_out)
        return fire(layer.hook_resid_post, after + fire(layer.hook_mlp_out, mlp_out))

    def _mlp(self, layer: Layer, x: Tensor, points: HookPoints) -> Tensor:
        fire = points.pass_through
        if layer.mlp_gate is None:
            post = layer.activate(fire(layer.hook_pre, linear(x, *layer.mlp_in)))
        else:
            pre = fire(layer.hook_pre, linear(x, layer.mlp_gate))
            pre_linear = fire(layer.hook_pre_linear, linear(x, layer.mlp_in[0]))
            post = layer.activate(pre)
            post = post.mul_(pre_linear) if layer.activation_is_new_tensor else post * pre_linear
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
        if self._rotary and points.is_used(layer.hook_rot_k):
            # A copy, since the buffer is modified later.
            keys = fire(layer.hook_rot_k, keys.transpose(1, 2).clone()).transpose(1, 2)
        q = q.transpose(1, 2)
        # Query heads that share keys are concatenated along the positions, so that keys need not be repeated.
        grouped = q.reshape(batch, kv_heads, -1, d_head)
        if layer.cap > 0 or points.is_used(layer.hook_pattern) or points.is_used(layer.hook_attn_scores):
            z = self._unfused_attention(layer, grouped, keys, values, step, points)
        elif step.is_causal(layer.kind):
            z = functional.scaled_dot_product_attention(
                q, keys, values, is_causal=True, enable_gqa=True, scale=1 / attn.attn_scale
            )
        else:
            z = functional.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=step.bias(layer.kind), scale=1 / attn.attn_scale
            )
        z = z.reshape(batch, heads, n_queries, d_head)
        fully_masked = step.fully_masked(layer.kind)
        z = fire(layer.hook_z, (z if fully_masked is None else z.masked_fill(fully_masked, 0)).transpose(1, 2))
        return linear(z.reshape(batch, n_queries, -1).to(layer.out[0].dtype), *layer.out)

    def _unfused_attention(
        self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor, step: Step, points: HookPoints
    ) -> Tensor:
        """Attention that computes scores and pattern explicitly, with softmax in float32 as in Hugging Face."""
        # Scaling queries before the product makes overflow of 16-bit floats less likely.
        scores = q / layer.attn.attn_scale @ keys.transpose(-1, -2)
        if layer.cap > 0:
            scores = torch.tanh(scores / layer.cap) * layer.cap
        scores = scores.view(len(q), self._n_heads, -1, step.stop)
        allowed = step.allowed(layer.kind)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        scores = points.pass_through(layer.hook_attn_scores, scores)
        pattern = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        if allowed is not None and step.padded:
            pattern = pattern.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)  # padding attends to nothing
        pattern = points.pass_through(layer.hook_pattern, pattern)
        return pattern.to(values.dtype).reshape(*q.shape[:3], step.stop) @ values

    def _rotation(self, layer: Layer, step: Step) -> tuple[Tensor, Tensor, bool]:
        """Cosines and signed sines `[batch, pos, 1, rotary_dim]` of a step, and whether pairs are adjacent."""
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
    """Logits `[pos, d_vocab]` of normed residuals `[pos, d_model]` by TransformerLens's `Unembed`.

    The result is a new tensor, even if hooks of the module keep a reference to its output.
    """
    if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
        return module(normed[None])[0].clone()
    return _unembedded(module, normed)


def _unembedded(module: Any, normed: Tensor) -> Tensor:
    """`W_U` and `b_U` applied to `[..., d_model]`."""
    logits = wide_linear(normed.flatten(0, -2), module.W_U.T).view(*normed.shape[:-1], module.W_U.shape[1])
    # On a GPU, adding a zero bias is cheaper than the synchronization needed to check for it.
    return logits.add_(module.b_U) if normed.is_cuda or module.b_U.any() else logits


def _has_module_hooks(tl: Any) -> bool:
    """Whether a module other than a hook point has hooks: FastForward does not call modules, so they would not run."""
    from transformer_lens.hook_points import HookPoint

    return any(
        module._forward_pre_hooks or (module._forward_hooks and not isinstance(module, HookPoint))
        for module in [tl, *tl.blocks.modules(), *tl.ln_final.modules(), *tl.unembed.modules()]
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """Apply rotary embedding to the first `rotary_dim` dimensions of each head of `[batch, pos, head, d_head]`."""
    width = cos.shape[-1]
    rotary_part = x if width == x.shape[-1] else x[..., :width]
    if adjacent_pairs:
        swapped = rotary_part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = rotary_part.roll(width // 2, -1)
    rotated = torch.addcmul(rotary_part * cos, swapped, sin)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)
