"""The fast forward pass through the blocks of a HookedTransformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlcapture.models.fast.layers import Biases, HookPoints, Layer, Norm, beside, identity
from tlcapture.models.fast.state import FastState, Step
from tlcapture.products import linear
from tlcapture.shapes import Logits, Mask, MaskSoFar, Residual, Tokens

# The most prompt positions per micro-batch. On a CPU, more are no faster: intermediate tensors no longer fit into the
# caches, and above some size the allocator maps new memory pages for each of them.
_MAX_POSITIONS = {"cpu": 1024}
_MAX_POSITIONS_OF_OTHER_DEVICES = 2**14
_MANY_ROWS = 128


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
        """Read the model's modules, options and weights again, in case they have changed."""
        tl, cfg = self._tl, self._tl.cfg
        self._n_heads = int(cfg.n_heads)
        self._n_kv_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self._shape = (int(cfg.n_layers), self._n_kv_heads, int(cfg.d_head))
        self._rotary = cfg.positional_embedding_type == "rotary"
        biases = Biases(tl.blocks)
        self._layers = [Layer(block, biases) for block in tl.blocks]
        self._final_norm = Norm(tl.ln_final)
        self._parameters = list(tl.parameters())

    def requires_grad(self) -> bool:
        """Whether any of the model's weights requires gradients."""
        return any(weight.requires_grad for weight in self._parameters)

    def tensors(self) -> list[Any]:
        """The model's weights and rotary tables, and the layers with the tensors derived from them."""
        tl = self._tl
        return [self._layers, self._final_norm, *(each.detach() for each in (*tl.parameters(), *tl.buffers()))]

    def version(self) -> tuple[Any, ...]:
        """A value that stays equal as long as neither the weights' addresses nor the options change."""
        parts = [self._final_norm, *self._layers]
        return (str(self._tl.cfg), [each.data_ptr() for each in self._parameters], *map(identity, parts))

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

    def begin(self, mask: MaskSoFar, state: FastState) -> Step:
        """The data that all layers share in a pass over new positions of `state`; `mask` covers all positions."""
        return state.begin(mask, self._n_heads // self._n_kv_heads, self._tl.cfg.window_size)

    def embed(self, tokens: Tokens, step: Step, points: HookPoints) -> Residual:
        """The residual stream before the first block, `[batch, pos, d_model]`, of tokens `[batch, pos]`."""
        tl = self._tl
        residual = points.pass_through(tl.hook_embed, tl.embed(tokens))
        if not self._rotary:
            residual = residual + points.pass_through(tl.hook_pos_embed, step.embed_positions(tl.pos_embed, tokens))
        return residual

    def __call__(self, residual: Residual, step: Step, state: FastState, points: HookPoints) -> Residual:
        """The residual stream after the last block, `[batch, pos, d_model]`.

        Args:
            residual: the residual stream before the first block at the new positions, `[batch, pos, d_model]`.
            step: the step of the new positions, from `begin`.
            state: keys and values so far; the new positions' are appended.
            points: calls hooks and keeps activations.
        """
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
        step = Step(state.mask, 0, state.length, 1, None, padded=True)
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
            if layer.gate_and_in is None:
                pre, pre_linear = linear(x, layer.mlp_gate), linear(x, layer.mlp_in[0])
            else:
                pre, pre_linear = linear(x, layer.gate_and_in).chunk(2, dim=-1)
            pre = points.pass_part(layer.hook_pre, pre)
            pre_linear = points.pass_part(layer.hook_pre_linear, pre_linear)
            post = layer.activate(pre)
            post = post.mul_(pre_linear) if layer.activation_is_new_tensor else post * pre_linear
            if layer.mlp_in[1] is not None:
                post += layer.mlp_in[1]
        return linear(fire(layer.hook_post, post), *layer.mlp_out)

    def _attention(self, layer: Layer, x: Tensor, step: Step, store: Tensor, points: HookPoints) -> Tensor:
        fire, attn = points.pass_through, layer.attn
        batch, n_queries, _ = x.shape
        heads, kv_heads, d_head = self._n_heads, self._n_kv_heads, self._shape[2]
        q, k, v = self._queries_keys_values(layer, x, points)
        if layer.qk_norms is not None:
            q, k = (points.norm(norm, each) for norm, each in zip(layer.qk_norms, (q, k), strict=True))
        if self._rotary:
            q, k = self._rotated(q, k, *self._rotation(layer, step))
            q = fire(layer.hook_rot_q, q)
        keys, values = step.append(store, k, v)
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
                grouped, keys, values, attn_mask=step.bias(layer.kind, q.dtype), scale=1 / attn.attn_scale
            )
        z = z.reshape(batch, heads, n_queries, d_head)
        fully_masked = step.fully_masked(layer.kind) if n_queries > 1 else None
        z = fire(layer.hook_z, (z if fully_masked is None else z.masked_fill(fully_masked, 0)).transpose(1, 2))
        # Flat, since torch multiplies the weight with each row of a batch separately if the heads of a row lie apart.
        flat = z.reshape(batch * n_queries, -1).to(layer.out[0].dtype)
        return linear(flat, *layer.out).view(batch, n_queries, -1)

    def _queries_keys_values(self, layer: Layer, x: Tensor, points: HookPoints) -> list[Tensor]:
        """`[batch, pos, head, d_head]` of each: parts of one product if its weights lie together in memory."""
        heads = (self._n_heads, self._n_kv_heads, self._n_kv_heads)
        if layer.qkv is None:
            parts = [linear(x, *product) for product in (layer.query, layer.key, layer.value)]
        else:
            parts = list(linear(x, *layer.qkv).split([count * self._shape[2] for count in heads], dim=-1))
        hooks = (layer.hook_q, layer.hook_k, layer.hook_v)
        return [
            points.pass_part(hook, part.view(*x.shape[:2], count, self._shape[2]))
            for hook, part, count in zip(hooks, parts, heads, strict=True)
        ]

    def _rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, together if they are next to each other in one tensor."""
        both = beside(q, k)
        if both is None:
            return _rotate(q, cos, sin, adjacent_pairs), _rotate(k, cos, sin, adjacent_pairs)
        q, k = _rotate(both, cos, sin, adjacent_pairs).split([q.shape[2], k.shape[2]], dim=2)
        return q, k

    def _unfused_attention(
        self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor, step: Step, points: HookPoints
    ) -> Tensor:
        """Attention that computes scores and pattern explicitly, with softmax in float32 as in Hugging Face."""
        # Scaling within the product makes overflow of 16-bit floats less likely.
        scale = layer.attn.attn_scale * (layer.cap if layer.cap > 0 else 1)
        transposed = keys.flatten(0, 1).transpose(-1, -2)
        scores = torch.baddbmm(q.new_empty(()), q.flatten(0, 1), transposed, beta=0, alpha=1 / scale)
        scores = scores.view(len(q), self._n_heads, -1, step.stop)
        masked, fully_masked = step.masked(layer.kind), step.fully_masked(layer.kind)
        if layer.cap > 0:
            penalty = step.penalty(layer.kind, scores.dtype)
            scores = scores.tanh_()  # of finite values, to which the penalty may be added
            scores = scores * layer.cap if penalty is None else torch.add(penalty, scores, alpha=layer.cap)
        elif masked is not None:
            scores = scores.masked_fill(masked, -torch.inf)
        scores = points.pass_through(layer.hook_attn_scores, scores)
        pattern = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        if fully_masked is not None:
            pattern = pattern.masked_fill(fully_masked, 0.0)  # padding attends to nothing
        pattern = points.pass_through(layer.hook_pattern, pattern)
        return pattern.to(values.dtype).reshape(*q.shape[:3], step.stop) @ values

    def _rotation(self, layer: Layer, step: Step) -> tuple[Tensor, Tensor, bool]:
        """Cosines and signed sines `[batch, pos, 1, rotary_dim]` of a step, and whether pairs are adjacent."""
        if layer.kind not in step.rotations:
            attn, cfg = layer.attn, layer.attn.cfg
            if attn.rotary_cos.shape[0] < step.stop:
                attn._extend_rotary_embeddings(min(cfg.n_ctx, max(step.stop, 2 * attn.rotary_cos.shape[0])))
            cos, sin = attn.rotary_cos[step.positions, None], attn.rotary_sin[step.positions, None]
            if cfg.rotary_adjacent_pairs:
                sin[..., ::2].neg_()
            else:
                sin[..., : sin.shape[-1] // 2].neg_()
            step.rotations[layer.kind] = (cos, sin, bool(cfg.rotary_adjacent_pairs))
        return step.rotations[layer.kind]


def final_norm(tl: Any, residual: Tensor) -> Tensor:
    """The output of a HookedTransformer's final norm for `[1, pos, d_model]`; fused if it has no hooks."""
    from transformer_lens.components import LayerNorm, RMSNorm

    norm = tl.ln_final
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in norm.modules())
    if hooked or type(norm) not in (LayerNorm, RMSNorm):
        return norm(residual) if tl.cfg.normalization_type is not None else residual
    return HookPoints({}).norm(Norm(norm), residual)


def unembed(module: Any, normed: Tensor) -> Tensor:
    """Logits `[pos, d_vocab]` of normed residuals `[pos, d_model]` by TransformerLens's `Unembed`.

    The result is a new tensor, even if hooks of the module keep a reference to its output.
    """
    if any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
        return module(normed[None])[0].clone()
    return _unembedded(module, normed)


def _unembedded(module: Any, normed: Tensor) -> Tensor:
    """`W_U` and `b_U` applied to `[..., d_model]`."""
    # On a GPU, adding a zero bias is cheaper than the synchronization needed to check for it. The product of many rows,
    # as for a logit lens, adds it before it writes the logits.
    if normed.is_cuda and normed.numel() >= _MANY_ROWS * normed.shape[-1]:
        return linear(normed, module.W_U.T, module.b_U)
    logits = linear(normed, module.W_U.T)
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
