"""An experiment's `config.json`: its models, and how prompts are formatted for them."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import lexists
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tlcapture.errors import InputError
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, write_json
from tlcapture.storage.locks import locked
from tlcapture.storage.remote.roots import refresh
from tlcapture.storage.validation import first_problem


class ExperimentConfig(BaseModel):
    """The content of `config.json`. `None` means not decided yet; command-line options take precedence."""

    model_config = ConfigDict(extra="allow", strict=True)

    extraction_model: str | None = None
    inference_model: str | None = None
    use_chat_template: bool | None = None
    system_prompt: str | None = None


def read_config(layout: Layout) -> ExperimentConfig:
    """The experiment's config, or an empty one where the file does not exist.

    Raises:
        InputError: the file does not hold a config.
        StorageError: the file cannot be read; a dangling link counts as such.
    """
    if not lexists(layout.config):
        return ExperimentConfig()
    value = read_json(layout.config, exact=True)
    try:
        return ExperimentConfig.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{layout.config}: {first_problem(error)}") from None


def settle_model(layout: Layout, role: str, asked: str | None, default: str, *, allow_change: bool = False) -> str:
    """The model an experiment uses in a role (`inference_model` or `extraction_model`).

    The first run records the model, later runs read it. If no model is recorded for the role, the one of the other
    role is used. Local files are recorded by their absolute path, so that they are found from any folder.

    Raises:
        InputError: `asked` differs from the recorded model and `allow_change` is not set.
    """
    config = read_config(layout)
    asked = None if asked is None else _full_name(asked)
    recorded = getattr(config, role)
    if recorded is not None and asked not in (None, recorded) and not allow_change:
        raise InputError(
            f"experiment {layout.experiment!r} uses {role} {recorded!r}, not {asked!r}: "
            "use another experiment, or pass --allow-model-change to change the model"
        )
    return str(asked or recorded or config.inference_model or config.extraction_model or default)


def _full_name(model: str) -> str:
    path = Path(model).expanduser()
    is_local = path.is_dir() or (path.suffix == ".gguf" and path.is_file())
    return str(path.resolve()) if is_local else model


def update_config(layout: Layout, **fields: Any) -> None:
    """Set fields of `config.json` and keep all others; writes only if a field changes."""
    if layout.config.exists() and _with(layout, fields) == read_config(layout):
        return
    with locked(layout.lock("config")):
        refresh(layout.config)
        write_json(layout.config, _with(layout, fields).model_dump(), indent=True)


def _with(layout: Layout, fields: Mapping[str, Any]) -> ExperimentConfig:
    return read_config(layout).model_copy(update=fields)
