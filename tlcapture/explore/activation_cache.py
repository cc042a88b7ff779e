"""TransformerLens's `ActivationCache` over a stored capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.models.checkpoints.checkpoint import quiet_loading
from tlcapture.models.lazy_model import LazyModel
from tlcapture.views.hooks import POINTS, hook

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from tlcapture.models.loading import Model


def activation_cache(
    capture: Capture, load: Callable[[], Model], stored: Callable[[str], Tensor | None] = lambda name: None
) -> ActivationCache:
    """A cache of the stored residual points (and `attn_out`), each `[n_tokens, d_model]` in float32.

    A capture of some tokens has rows for its `positions` only.

    The cache has no batch axis. It holds stored activations and nothing derived from them: the difference of two
    rounded residuals is not an activation. Models with parallel blocks have no `hook_resid_mid`, and layers without
    attention no `hook_attn_out`.

    Args:
        load: returns the captured model; called by the first cache method that needs it.
        stored: an activation by its name from another file, in float32, or `None`; called when it is first asked for.
    """
    with quiet_loading():
        from transformer_lens import ActivationCache

    points = [point for point in POINTS if point in capture.kept.points]
    if "after_attn" in points and "+" in (capture.metadata.get("hooks") or {}).get("after_attn", ""):
        points.remove("after_attn")
    at = [(point, layer) for layer in capture.kept.layers for point in points]
    if capture.prompt.residual.attn_out is not None:
        at += [("attn_out", layer) for layer in capture.prompt.residual.output_layers]
    entries = {hook(point, layer): capture.residual(layer, point).float() for point, layer in at}
    lazy = LazyModel(load, str(capture.metadata["inference_model"]))
    model = _ModelOfCache(lazy, n_layers=capture.n_layers, d_model=int(capture.metadata["d_model"]))
    cached = _WithFinalScale(entries, model, capture.n_layers, capture.kept.described(), stored)
    return ActivationCache(cached, model, has_batch_dim=False)


class _WithFinalScale(dict[str, Tensor]):
    """Adds entries on first use: the entries of other files, and the final norm's scale, which needs the epsilon."""

    _KEY = "ln_final.hook_scale"

    def __init__(
        self,
        entries: dict[str, Tensor],
        model: Any,
        n_layers: int,
        described: str,
        stored: Callable[[str], Tensor | None],
    ):
        super().__init__(entries)
        self._stored = stored
        self._model = model
        self._described = described
        self._last = hook("residual_out", n_layers - 1)

    def __missing__(self, key: str) -> Tensor:
        if key != self._KEY:
            found = self._stored(key)
            if found is None:
                raise KeyError(
                    f"{key}: {self._described}; patterns and internals are available where they were stored; "
                    "cap.attention(layer) and cap.internals(layer) compute them"
                )
            self[key] = found
            return found
        last = self[self._last]
        if self._model.normalization_centres:
            last = last - last.mean(dim=-1, keepdim=True)
        self[key] = torch.sqrt(last.pow(2).mean(dim=-1, keepdim=True) + self._model.cfg.eps)
        return self[key]


class _ModelOfCache:
    """A stand-in for `ActivationCache`'s TransformerLens model: knows its sizes, and loads it for everything else.

    The cache's methods assume weights whose norms are folded in, and tensors on the model's device. Here, weights
    are those of the checkpoint and activations are in main memory. Token directions are therefore multiplied by the
    final norm's gain, and norms accept tensors on any device.
    """

    def __init__(self, lazy: LazyModel, **sizes: int):
        self._lazy = lazy
        self._sizes = sizes

    @property
    def cfg(self) -> Any:
        return _ConfigOfCache(self._lazy, self._sizes)

    @property
    def normalization_centres(self) -> bool:
        return str(self.cfg.normalization_type).startswith("LN")

    def ln_final(self, residual: Tensor) -> Tensor:
        return self._lazy.load().final_norm(residual)

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Directions whose dot product with a normalised residual is a token's logit.

        The logit is taken before the soft cap and without the biases of norm and unembedding, which belong to no
        component.
        """
        model = self._lazy.load()
        if isinstance(tokens, Tensor):
            tokens = tokens.to(model.device)
        directions = model.tl.tokens_to_residual_directions(tokens)
        return directions.to("cpu", torch.float32) * model.final_norm_gain() * model.logit_scale

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._lazy.load().tl, name)


class _ConfigOfCache:
    """The model's config, whose sizes are known without loading the model."""

    def __init__(self, lazy: LazyModel, sizes: dict[str, int]):
        self._lazy = lazy
        vars(self).update(sizes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._lazy.load().tl.cfg, name)
