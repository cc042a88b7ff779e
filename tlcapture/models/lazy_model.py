"""A model that is loaded when it is first touched, so that a session that needs none waits for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcapture.models.loading import Model


class LazyModel:
    """Stands for a `Model`: whatever is asked of it is asked of the model, which is then loaded.

    To show itself or to list what it has, it loads nothing.
    """

    def __init__(self, load: Callable[[], Model], name: str):
        self._load = load
        self._name = name
        self._model: Model | None = None

    def load(self) -> Model:
        """The model itself."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what a shell asks of every object that it shows
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __dir__(self) -> list[str]:
        from_the_model = ("tl", "tokenizer", "name", "fingerprint", "engine", "device", "dtype", "n_layers", "d_model")
        return sorted({*super().__dir__(), *from_the_model, *(dir(self._model) if self._model else ())})

    def __repr__(self) -> str:
        if self._model is None:
            return f"<model {self._name!r}, loaded when first touched>"
        model = self._model
        dtype = str(model.dtype).removeprefix("torch.")
        return f"<model {model.name!r} on engine {model.engine}, {model.device}, {dtype}: {model.n_layers} layers>"
