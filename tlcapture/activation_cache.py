"""TransformerLens's `ActivationCache` over a stored capture."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlcapture.captures import Capture
from tlcapture.models import quiet_loading

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from tlcapture.models import Model


def activation_cache(capture: Capture, load: Callable[[], Model]) -> ActivationCache:
    """A cache of the residual points (and `attn_out` where captured), `[n_tokens, d_model]` in float32.

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
        for layer in range(capture.n_layers)
        for hook, point in hooks.items()
    }
    model = _LazyModel(load, n_layers=capture.n_layers, d_model=int(capture.metadata["d_model"]))
    return ActivationCache(_WithFinalScale(entries, model, capture.n_layers), model, has_batch_dim=False)


class _WithFinalScale(dict[str, Tensor]):
    """The entries, and the final norm's scale, which needs the model's epsilon and is made when asked for."""

    _KEY = "ln_final.hook_scale"

    def __init__(self, entries: dict[str, Tensor], model: Any, n_layers: int):
        super().__init__(entries)
        self._model = model
        self._last = f"blocks.{n_layers - 1}.hook_resid_post"

    def __missing__(self, key: str) -> Tensor:
        if key != self._KEY:
            raise KeyError(key)
        last = self[self._last]
        if self._model.normalization_centres:
            last = last - last.mean(dim=-1, keepdim=True)
        self[key] = torch.sqrt(last.pow(2).mean(dim=-1, keepdim=True) + self._model.cfg.eps)
        return self[key]


class _LazyModel:
    """Stands for the TransformerLens model: knows its measures, loads it for everything else."""

    def __init__(self, load: Callable[[], Model], **measures: int):
        self._load = load
        self._measures = measures
        self._loaded: Any = None

    @property
    def cfg(self) -> Any:
        return _LazyConfig(self, self._measures)

    @property
    def normalization_centres(self) -> bool:
        return str(self.cfg.normalization_type).startswith("LN")

    def tl(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load().tl
        return self._loaded

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tl(), name)


class _LazyConfig(SimpleNamespace):
    """A model's config whose measures are known without loading it."""

    def __init__(self, model: _LazyModel, measures: dict[str, int]):
        super().__init__(**measures)
        self.__dict__["_model"] = model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_model"].tl().cfg, name)
