"""The model a command runs, loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tlcapture.config import settle_model
from tlcapture.embedded import NAME, is_converted
from tlcapture.layout import Layout
from tlcapture.runs.report import Reporter

if TYPE_CHECKING:
    from tlcapture.models import Model


def model_loader(
    layout: Layout,
    role: str,
    reporter: Reporter,
    *,
    model: str | None,
    allow_model_change: bool,
    engine: str,
    device: str,
    dtype: str,
) -> Callable[[], Model]:
    """A function that loads the model of an experiment's role, after saying so.

    Raises `InputError` at once where the model asked for is not the experiment's.
    """
    name = settle_model(layout, role, model, NAME, allow_change=allow_model_change)

    def load() -> Model:
        from tlcapture.models import load_model

        first_time = name == NAME and not is_converted()
        reporter.line(f"loading {name}{', converting it once first' if first_time else ''} ...")
        loaded = load_model(name, engine=engine, device=device, dtype=dtype)
        dtype_name = str(loaded.dtype).removeprefix("torch.")
        reporter.line(
            f"{name} on engine {loaded.engine}, {loaded.device}, {dtype_name}: {loaded.n_layers} layers, "
            f"d_model {loaded.d_model}"
        )
        return loaded

    return load
