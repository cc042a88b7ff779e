"""TransformerLens's `ActivationCache` over a stored capture."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.models.checkpoints import quiet_loading
from tlcapture.views.hooks import hook

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from tlcapture.models.loading import Model


def activation_cache(capture: Capture, load: Callable[[], Model]) -> ActivationCache:
    """A cache of the residual points (and `attn_out`) that were kept, `[n_tokens, d_model]` in float32.

    It holds what was stored and nothing derived: the difference of two rounded residuals would be no
    activation. Models with parallel blocks have no `hook_resid_mid`.
    """
    with quiet_loading():
        from transformer_lens import ActivationCache

    hooks = {"hook_resid_pre": "residual_in", "hook_resid_mid": "after_attn", "hook_resid_post": "residual_out"}
    if capture.metadata.get("parallel_blocks"):
        del hooks["hook_resid_mid"]
    if capture.prompt.residual.attn_out is not None:
        hooks["hook_attn_out"] = "attn_out"
    entries = {
        f"blocks.{layer}.{hook}": capture.residual(layer, point).float()
        for layer in capture.kept.layers
        for hook, point in hooks.items()
        if point in (*capture.kept.points, "attn_out")
    }
    model = _ModelOfCache(load, n_layers=capture.n_layers, d_model=int(capture.metadata["d_model"]))
    whole = _WithFinalScale(entries, model, capture.n_layers, capture.kept.described())
    return ActivationCache(whole, model, has_batch_dim=False)


class _WithFinalScale(dict[str, Tensor]):
    """The entries, and the final norm's scale, which needs the model's epsilon and is made when asked for."""

    _KEY = "ln_final.hook_scale"

    def __init__(self, entries: dict[str, Tensor], model: Any, n_layers: int, described: str):
        super().__init__(entries)
        self._model = model
        self._described = described
        self._last = hook("residual_out", n_layers - 1)

    def __missing__(self, key: str) -> Tensor:
        if key != self._KEY:
            raise KeyError(f"{key}: {self._described}")
        last = self[self._last]
        if self._model.normalization_centres:
            last = last - last.mean(dim=-1, keepdim=True)
        self[key] = torch.sqrt(last.pow(2).mean(dim=-1, keepdim=True) + self._model.cfg.eps)
        return self[key]


class _ModelOfCache:
    """Stands for the TransformerLens model: knows its measures, loads it for everything else.

    TransformerLens's cache methods assume weights whose norms are folded in, and tensors on the
    model's device. Here weights are as the checkpoint has them and activations in main memory:
    directions of tokens get the final norm's gain, and norms take tensors from wherever they are.
    """

    def __init__(self, load: Callable[[], Model], **measures: int):
        self._load = load
        self._measures = measures
        self._loaded: Model | None = None

    @property
    def cfg(self) -> Any:
        return _ConfigOfCache(self, self._measures)

    @property
    def normalization_centres(self) -> bool:
        return str(self.cfg.normalization_type).startswith("LN")

    def model(self) -> Model:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def ln_final(self, residual: Tensor) -> Tensor:
        return self.model().final_norm(residual)

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """The directions whose dot product with a normalised residual stream is a token's logit (before
        the soft cap, and but for the biases of norm and unembedding, which belong to no component)."""
        model = self.model()
        if isinstance(tokens, Tensor):
            tokens = tokens.to(model.device)
        directions = model.tl.tokens_to_residual_directions(tokens)
        return directions.to("cpu", torch.float32) * model.final_norm_gain()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model().tl, name)


class _ConfigOfCache(SimpleNamespace):
    """A model's config whose measures are known without loading it."""

    def __init__(self, model: _ModelOfCache, measures: dict[str, int]):
        super().__init__(**measures)
        self.__dict__["_model"] = model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_model"].model().tl.cfg, name)
