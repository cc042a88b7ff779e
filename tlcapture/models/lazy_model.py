"""A model that is loaded on first use, so that sessions that do not need it need not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcapture.models.loading import Model


class LazyModel:
    """Stands in for a `Model`: accessing any public attribute loads the model and returns its attribute.

    `repr` and `dir` load nothing.

    Args:
        load: loads the model; called once.
        name: shown until the model is loaded.
    """

    def __init__(self, load: Callable[[], Model], name: str):
        self._load = load
        self._name = name
        self._model: Model | None = None

    def load(self) -> Model:
        """The model itself, loaded on the first call."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a shell looks these up on every object it displays
            raise AttributeError(name)
        return getattr(self.load(), name)

    def __dir__(self) -> list[str]:
        from_the_model = ("tl", "tokenizer", "name", "fingerprint", "engine", "device", "dtype", "n_layers", "d_model")
        return sorted({*super().__dir__(), *from_the_model, *(dir(self._model) if self._model else ())})

    def __repr__(self) -> str:
        if self._model is None:
            return f"<model {self._name!r}, loaded on first use>"
        return repr(self._model)
