"""The forward pass of a HookedTransformer, computed with less work between its matrix products.

    fast = FastForward(hooked)
    state = FastState.empty(batch_size)
    residual = fast(tokens, mask, state)           # all hook points of the blocks have fired

The same parameters, the same hook points with the same tensors, the same values to float tolerance; a
reader who wants to know what is computed can skip this module and read TransformerLens. What differs:
keys are rotated once and kept rotated, in buffers that are written to in place; grouped keys and values
are never repeated; attention is fused unless somebody watches its scores or pattern; masks, positions
and rotary tables are made once a step, not once a layer; products of few rows take another way (`products`);
and a hook point that nobody hooked is not called. `load_model(..., fast=False)` and the environment variable
`TLCAPTURE_FAST=0` switch it off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlcapture.products import linear, wide_linear
from tlcapture.shapes import Logits, Mask, Residual, Rows, Tokens

_ROOM = 64  # positions by which the buffer of keys and values grows at least

# Positions of prompts that are computed together: more are no faster, and what lies between two products
# then leaves the caches, and soon takes fresh pages of memory at every product.
_PART = {"cpu": 1024}
_PART_ELSEWHERE = 2**14

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    # Three names in TransformerLens for one function.
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass
class FastState:
    """Keys and values of a batch so far, `[layer, 2, batch, n_kv_heads, capacity, d_head]`, and its mask."""

    mask: Mask
    store: Tensor | None = None

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> FastState:
        return cls(torch.zeros(batch_size, 0, dtype=torch.long, device=device))

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def keep(self, rows: Rows) -> None:
        """Drop all but `rows`, which move up within the store."""
        self.mask = self.mask[rows]
        if self.store is not None:
            kept = rows.nonzero()[:, 0].tolist()
            for place, row in enumerate(kept):
                if place != row:
                    self.store[:, :, place, :, : self.length] = self.store[:, :, row, :, : self.length]
            self.store = self.store[:, :, : len(kept)]

    def branch(self, rows: Sequence[int]) -> FastState:
        """A new state of copies of the given rows."""
        index = torch.tensor(rows, device=self.mask.device)
        return FastState(self.mask[index], None if self.store is None else self.store[:, :, index])

    def reserve(self, length: int, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """The store, with room for `length` positions; `shape` is `(n_layers, n_kv_heads, d_head)`."""
        n_layers, n_heads, d_head = shape
        if self.store is None or self.store.shape[-2] < length:
            old = 0 if self.store is None else self.store.shape[-2]
            capacity = length + max(_ROOM, old // 2)
            grown = like.new_empty(n_layers, 2, self.mask.shape[0], n_heads, capacity, d_head)
            if self.store is not None:
                grown[..., :old, :] = self.store
            self.store = grown
        return self.store


@dataclass
class _Step:
    """What all layers of one forward pass share. `allowed` and `bias` are made when first asked for."""

    mask: Mask  # of all positions so far
    start: int
    stop: int
    groups: int
    dtype: torch.dtype
    window: int | None
    padded: bool
    rotations: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)
    _allowed: dict[str, Tensor | None] = field(default_factory=dict)
    _bias: dict[str, Tensor | None] = field(default_factory=dict)

    def allowed(self, kind: str) -> Tensor | None:
        """Which keys each query may see, `[batch or 1, 1, query, key]`; `None` where it is all of them."""
        if kind not in self._allowed:
            device = self.mask.device
            queries = torch.arange(self.start, self.stop, device=device)[:, None]
            keys = torch.arange(self.stop, device=device)
            window = self.window if kind == "local" else None
            if self.stop - self.start == 1 and not self.padded and (window is None or self.stop <= window):
                self._allowed[kind] = None
            else:
                seen = keys <= queries
                if window is not None:
                    seen &= keys > queries - window
                seen = seen[None, None]
                self._allowed[kind] = seen & self.mask[:, None, None].bool() if self.padded else seen
        return self._allowed[kind]

    def bias(self, kind: str) -> Tensor | None:
        """The same as numbers to add to scores, for queries grouped by the heads that share keys.

        Half of the lowest number rather than -inf, so that a row of padding alone stays finite.
        """
        if kind not in self._bias:
            seen = self.allowed(kind)
            if seen is not None:
                batch, _, n_queries, n_keys = seen.shape
                bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
                seen = bias.masked_fill_(~seen, torch.finfo(self.dtype).min / 2)
                if n_queries > 1:
                    seen = seen[:, :, None].expand(-1, -1, self.groups, -1, -1)
                    seen = seen.reshape(batch, 1, self.groups * n_queries, n_keys)
            self._bias[kind] = seen
        return self._bias[kind]


class FastForward:
    """Runs the blocks of a `HookedTransformer`; `supports` says of which."""

    def __init__(self, tl: Any):
        self._tl = tl
        cfg = tl.cfg
        self._n_heads = int(cfg.n_heads)
        self._n_kv_heads = int(cfg.n_key_value_heads or cfg.n_heads)
        self._shape = (int(cfg.n_layers), self._n_kv_heads, int(cfg.d_head))
        self._rotary = cfg.positional_embedding_type == "rotary"
        self._activate = _ACTIVATIONS.get(cfg.act_fn, tl.blocks[0].mlp.act_fn)
        self.refresh()

    @staticmethod
    def supports(tl: Any) -> bool:
        """Whether the model is one of those computed here, with TransformerLens's options as they are now."""
        from transformer_lens.components import MLP, Attention, GatedMLP, GroupedQueryAttention

        cfg = tl.cfg
        foreign = (
            cfg.use_attn_result,
            cfg.use_attn_in,
            cfg.use_split_qkv_input,
            cfg.use_hook_mlp_in,
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
        )
        plain = all(
            type(block.attn) in (Attention, GroupedQueryAttention) and type(block.mlp) in (MLP, GatedMLP)
            for block in tl.blocks
        )
        return plain and not any(foreign)

    def refresh(self) -> None:
        """Look at the model's modules and weights again, as somebody may have changed them since."""
        self._layers = [_Layer(block) for block in self._tl.blocks]

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

    def __call__(
        self, tokens: Tokens, mask: Mask, state: FastState, hooks: Set[str]
    ) -> tuple[Residual, dict[str, Tensor]]:
        """The residual stream behind the last block, at the positions of `tokens`, and the activations at
        the hook points `hooks`, as those who hooked them left them; extends `state` by the tokens."""
        tl, start = self._tl, state.length
        state.mask = torch.cat([state.mask, mask], dim=1)
        points = _HookPoints({tl.hook_dict[name]: name for name in hooks})
        residual = points.pass_through(tl.hook_embed, tl.embed(tokens))
        if not self._rotary:
            residual = residual + points.pass_through(tl.hook_pos_embed, tl.pos_embed(tokens, start, state.mask))
        step = _Step(
            state.mask,
            start,
            state.length,
            self._n_heads // self._n_kv_heads,
            residual.dtype,
            tl.cfg.window_size,
            padded=not bool(state.mask.all()),
        )
        store = state.reserve(state.length, self._shape, residual)
        for layer, keys_and_values in zip(self._layers, store.unbind(), strict=True):
            residual = self._block(layer, residual, step, keys_and_values, points)
        return residual, points.kept

    def unembed(self, normed: Residual) -> Logits:
        """`W_U` and `b_U` applied to `[pos, d_model]`."""
        unembed = self._tl.unembed
        if unembed.hook_in._forward_hooks or unembed.hook_out._forward_hooks:
            return unembed(normed[None])[0]
        weight = unembed.W_U.T
        logits = wide_linear(normed, weight)
        # An accelerator adds zeros sooner than it tells whether they are.
        return logits.add_(unembed.b_U) if normed.is_cuda or unembed.b_U.any() else logits

    def _block(self, layer: _Layer, residual: Tensor, step: _Step, store: Tensor, points: _HookPoints) -> Tensor:
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

    def _mlp(self, layer: _Layer, x: Tensor, points: _HookPoints) -> Tensor:
        fire = points.pass_through
        if layer.mlp_gate is None:
            post = self._activate(fire(layer.hook_pre, linear(x, *layer.mlp_in)))
        else:
            pre = fire(layer.hook_pre, linear(x, layer.mlp_gate))
            pre_linear = fire(layer.hook_pre_linear, linear(x, layer.mlp_in[0]))
            post = self._activate(pre).mul_(pre_linear)
            if layer.mlp_in[1] is not None:
                post += layer.mlp_in[1]
        return linear(fire(layer.hook_post, post), *layer.mlp_out)

    def _attention(self, layer: _Layer, x: Tensor, step: _Step, store: Tensor, points: _HookPoints) -> Tensor:
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
        # Queries whose heads share keys lie behind each other, as if they were more positions.
        q = q.transpose(1, 2).reshape(batch, kv_heads, -1, d_head)
        if layer.cap > 0 or points.watches(layer.hook_pattern) or points.watches(layer.hook_attn_scores):
            z = self._watched(layer, q, keys, values, step, points)
        else:
            bias = step.bias(layer.kind)
            z = functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1 / attn.attn_scale)
        z = fire(layer.hook_z, z.reshape(batch, heads, n_queries, d_head).transpose(1, 2))
        return linear(z.reshape(batch, n_queries, -1), *layer.out)

    def _watched(
        self, layer: _Layer, q: Tensor, keys: Tensor, values: Tensor, step: _Step, points: _HookPoints
    ) -> Tensor:
        """Attention with its scores and its pattern to be seen; softmax in float32, as Hugging Face has it."""
        scores = q @ keys.transpose(-1, -2) / layer.attn.attn_scale
        if layer.cap > 0:
            scores = torch.tanh(scores / layer.cap) * layer.cap
        scores = scores.view(len(q), self._n_heads, -1, step.stop)
        seen = step.allowed(layer.kind)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        scores = points.pass_through(layer.hook_attn_scores, scores)
        pattern = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        if step.padded:
            pattern = pattern.nan_to_num(0.0)
        pattern = points.pass_through(layer.hook_pattern, pattern)
        return pattern.view(*q.shape[:3], step.stop) @ values

    def _rotation(self, layer: _Layer, step: _Step) -> tuple[Tensor, Tensor, bool]:
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


class _HookPoints:
    """A pass's dealings with TransformerLens's hook points: who hooked them is called, what is wanted is kept."""

    def __init__(self, wanted: dict[Any, str]):
        self._wanted = wanted
        self.kept: dict[str, Tensor] = {}

    def watches(self, point: Any) -> bool:
        return point in self._wanted or bool(point._forward_hooks)

    def pass_through(self, point: Any, activation: Tensor) -> Tensor:
        """The activation, or what those who hooked the point make of it."""
        if point._forward_hooks:
            activation = point(activation)
        if point in self._wanted:
            self.kept[self._wanted[point]] = activation
        return activation

    def norm(self, norm: _Norm, x: Tensor) -> Tensor:
        if self.watches(norm.hook_scale) or self.watches(norm.hook_normalized):
            return self._watched_norm(norm, x)
        if norm.bias is None:
            return functional.rms_norm(x, norm.shape, norm.weight, norm.eps)
        return functional.layer_norm(x, norm.shape, norm.weight, norm.bias, norm.eps)

    def _watched_norm(self, norm: _Norm, x: Tensor) -> Tensor:
        # TransformerLens shows queries and keys of all heads to their norms in one line.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide.flatten(0, -2) if x.ndim > 3 else wide
        if norm.bias is not None:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = self.pass_through(norm.hook_scale, (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt())
        normed = self.pass_through(norm.hook_normalized, wide / scale).to(x.dtype) * norm.weight
        return (normed if norm.bias is None else normed + norm.bias).view(x.shape)


class _Norm:
    """What a pass reads of a norm, as plain attributes, which are found sooner than those of a module."""

    def __init__(self, norm: Any):
        self.weight: Tensor = norm.w
        self.bias: Tensor | None = norm._parameters.get("b")
        self.shape = norm.w.shape
        self.eps = float(norm.eps)
        self.hook_scale = norm.hook_scale
        self.hook_normalized = norm.hook_normalized


class _Layer:
    """What a pass reads of a block, likewise; weights are `[out, in]`, views of the block's parameters laid out
    for it, and biases `None` where they are zero."""

    def __init__(self, block: Any):
        attn, mlp = block.attn, block.mlp
        self.attn = attn
        self.kind: str = attn.attn_type
        self.cap = float(attn.cfg.attn_scores_soft_cap)
        grouped = "_" if "_W_K" in attn._parameters else ""
        names = (("W_Q", "b_Q"), (f"{grouped}W_K", f"{grouped}b_K"), (f"{grouped}W_V", f"{grouped}b_V"))
        self.query, self.key, self.value = (
            (getattr(attn, weight).permute(0, 2, 1).flatten(0, 1), _unless_zero(getattr(attn, bias).flatten()))
            for weight, bias in names
        )
        self.out = (attn.W_O.permute(2, 0, 1).flatten(1), _unless_zero(attn.b_O))
        self.mlp_gate: Tensor | None = mlp.W_gate.T if mlp.cfg.gated_mlp else None
        self.mlp_in = (mlp.W_in.T, _unless_zero(mlp.b_in))
        self.mlp_out = (mlp.W_out.T, _unless_zero(mlp.b_out))
        both_sides = block.cfg.use_normalization_before_and_after
        self.ln1, self.ln2 = _Norm(block.ln1), _Norm(block.ln2)
        self.ln1_post = _Norm(block.ln1_post) if both_sides else None
        self.ln2_post = _Norm(block.ln2_post) if both_sides else None
        self.qk_norms = None if attn.q_norm is None else (_Norm(attn.q_norm), _Norm(attn.k_norm))
        self.hook_resid_pre, self.hook_resid_post = block.hook_resid_pre, block.hook_resid_post
        self.hook_resid_mid = None if block.cfg.parallel_attn_mlp else block.hook_resid_mid
        self.hook_attn_out, self.hook_mlp_out = block.hook_attn_out, block.hook_mlp_out
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = attn.hook_q, attn.hook_k, attn.hook_v, attn.hook_z
        self.hook_rot_q, self.hook_rot_k = getattr(attn, "hook_rot_q", None), getattr(attn, "hook_rot_k", None)
        self.hook_attn_scores, self.hook_pattern = attn.hook_attn_scores, attn.hook_pattern
        self.hook_pre, self.hook_post = mlp.hook_pre, mlp.hook_post
        self.hook_pre_linear = getattr(mlp, "hook_pre_linear", None)


def _unless_zero(bias: Tensor) -> Tensor | None:
    return bias if bias.any() else None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """Rotary embedding of `[batch, pos, head, d_head]`: of the first `rotary_dim` numbers of a head."""
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if adjacent_pairs else turned.roll(width // 2, -1)
    rotated = torch.addcmul(turned * cos, swapped, sin)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)
