"""The model that a run uses: its name is known from the start, its weights are loaded when they are first needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tlcapture.models.checkpoints.adapters import adapter_folder
from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
from tlcapture.models.checkpoints.embedded import is_converted
from tlcapture.runs.display import Display
from tlcapture.text import dtype_name

if TYPE_CHECKING:
    from tlcapture.models.checkpoints.transfer import ModelFiles
    from tlcapture.models.loading import Model, ModelOutline


@dataclass(frozen=True)
class ModelLoader:
    """Loads a model when it is first called, with a message to the display; further calls return the same model.

    `source` is the folder of the model's files if they are not found by `name`, an `adapter`'s files being in a folder
    in it; `check` tells whether to compare a short prompt with Hugging Face, as in `load_model`.
    """

    name: str
    display: Display
    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    n_devices: int = 1
    source: Path | None = None
    check: bool = True
    adapter: str | None = None

    def require(self) -> None:
        """Raise `ModelError` if the model cannot be there, within a few seconds and without importing torch."""
        from tlcapture.models.checkpoints.sources import check_name

        if self.source is None:
            check_name(self.name)
        if self.adapter is not None:
            from tlcapture.models.checkpoints.adapters import given_adapter

            given_adapter(self.adapter, self.name)

    def silent(self) -> ModelLoader:
        """A loader of the same model that shows no messages, and that can be sent to another process."""
        return replace(self, display=Display())

    @cached_property
    def outline(self) -> ModelOutline:
        """The model's measures and tokenizer, without its weights."""
        from tlcapture.models.loading import outline_model

        return outline_model(self.name, self.adapter)

    @property
    def named(self) -> dict[str, str]:
        """The engine and the dtype, as metadata has them, where they are not left to be chosen when the model loads."""
        return {name: value for name in ("engine", "dtype") if (value := getattr(self, name)) != "auto"}

    def files(self) -> ModelFiles:
        """The model's files; those of a hub model are downloaded once."""
        from tlcapture.models.checkpoints.transfer import ModelFiles

        return ModelFiles.of(self.name, self.adapter)

    def __call__(self) -> Model:
        """The model, loaded on the first call.

        Raises:
            ModelError: it cannot be loaded.
        """
        return self._model

    @cached_property
    def _model(self) -> Model:
        from tlcapture.models.loading import load_model

        first_time = self.name == EMBEDDED and self.source is None and not is_converted()
        self.display.line(f"loading {self.name}{', converting it once first' if first_time else ''} ...")
        model = load_model(
            self.name,
            engine=self.engine,
            device=self.device,
            dtype=self.dtype,
            adapter=self.adapter,
            source=self.source,
            adapter_source=None if self.adapter is None else adapter_folder(self.adapter, self.source),
            n_devices=self.n_devices,
            check=self.check,
            warn=self.display.warn,
        )
        dtype = dtype_name(model.dtype)
        adapter = {} if model.adapter is None else {"adapter": model.adapter}
        facts = {"name": model.name, **adapter, "engine": model.engine, "device": str(model.device), "dtype": dtype}
        self.display.uses(model={**facts, "fingerprint": model.fingerprint})
        sizes = f"{model.n_layers} layers, d_model {model.d_model}"
        merged = "" if self.adapter is None else f" with adapter {self.adapter}"
        self.display.line(
            f"{self.name}{merged} on engine {model.engine}, {model.device}, {dtype}: {sizes}{self._why(model)}"
        )
        return model

    def _why(self, model: Model) -> str:
        """Why the model does not run on the default engine, in brackets; empty if it does or if another was chosen."""
        from tlcapture.models.loading import why_bridge

        is_fallback = self.engine == "auto" and model.engine == "bridge"
        return f" ({why_bridge(model.hf_config)})" if is_fallback else ""
