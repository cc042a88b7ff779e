"""Options that choose a model, and how to run it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from tlcapture.cli.options.grouping import option, shared
from tlcapture.cli.options.types import Count

if TYPE_CHECKING:
    from tlcapture.runs.display import Display
    from tlcapture.runs.model_loader import ModelLoader
    from tlcapture.storage.experiments.layout import Layout

MODEL_NAMES = "smollm2 (embedded), a folder of Hugging Face weights, a GGUF file, or a hub name (also name@revision)."


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model: engine, device, number of devices and compute dtype."""

    engine: str = option(
        "--engine",
        type=click.Choice(["auto", "hooked", "bridge"]),
        default="auto",
        show_default=True,
        help="hooked: HookedTransformer; bridge: TransformerBridge; auto: hooked where it supports the model.",
    )
    device: str = option(
        "--device", default="auto", show_default=True, help="cuda, mps or cpu; auto: the first available."
    )
    n_devices: int = option(
        "--n-devices",
        type=Count(),
        default=1,
        show_default=True,
        help="CUDA devices to spread the model over, where it is too large for one.",
    )
    dtype: str = option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Compute dtype; auto: the checkpoint's own, float32 on a CPU.",
    )

    def loader(self, name: str, display: Display) -> ModelLoader:
        """The loader of the model with this name."""
        from tlcapture.runs.model_loader import ModelLoader

        return ModelLoader(name, display, self.engine, self.device, self.dtype, self.n_devices)


@dataclass(frozen=True)
class ModelOptions:
    """Which model an experiment uses, and how to run it; without `model`, the experiment's own."""

    model: str | None = option(
        "--model", metavar="NAME", help=f"{MODEL_NAMES}  [default: the experiment's, or smollm2]"
    )
    revision: str | None = option(
        "--revision", metavar="REV", help="Branch, tag or commit of a model on the hub.  [default: main]"
    )
    allow_model_change: bool = option(
        "--allow-model-change", is_flag=True, help="Continue even if the experiment has used another model so far."
    )
    engine_options: EngineOptions = shared(EngineOptions)
    no_check: bool = option(
        "--no-check",
        is_flag=True,
        help="Skip the comparison of a short prompt with Hugging Face, made once per checkpoint and set of versions.",
    )

    def loader_for(self, layout: Layout, role: str, display: Display) -> ModelLoader:
        """The loader of the experiment's model in a role.

        Raises:
            InputError: the experiment has used another model in this role, and the change is not allowed.
        """
        from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
        from tlcapture.storage.experiments.config import settle_model

        name = settle_model(layout, role, self._named(), EMBEDDED, allow_change=self.allow_model_change)
        return replace(self.engine_options.loader(name, display), check=not self.no_check)

    def _named(self) -> str | None:
        """The model with its revision, such as `org/model@main`."""
        if self.revision is None:
            return self.model
        if self.model is None or "@" in self.model:
            raise click.UsageError("--revision needs --model with a name on the hub, without '@'")
        return f"{self.model}@{self.revision}"
