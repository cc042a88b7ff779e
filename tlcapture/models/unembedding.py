"""The final norm and unembedding of a model, loaded without most of its other weights.

The model is loaded with its first layer alone: transformers reads no weights of the others. Its fingerprint, for which
a few numbers of every weight are read from the checkpoint, is compared with the captured model's. If a
checkpoint's layout does not allow that, the whole model is loaded.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.adapters import adapter_of, digest_of, given_adapter, is_within_layers
from tlcapture.models.checkpoints.checkpoint import cast, fetch, fetch_tokenizer, fingerprint_of, quiet_loading
from tlcapture.models.checkpoints.quantised import is_dequantised
from tlcapture.models.checkpoints.sources import source_of
from tlcapture.models.checkpoints.text_models import auto_class_of, text_model_of
from tlcapture.models.engines.base import Model
from tlcapture.models.loading import DTYPES, from_hugging_face, load_model, pick_device

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class WantedModel:
    """The model of a capture: its name, fingerprint, engine and dtype, and its adapter, if it has one.

    `base_fingerprint` and `adapter_digest` identify the weights without the adapter, and the adapter.
    """

    name: str
    fingerprint: str
    engine: str
    dtype: str
    adapter: str | None = None
    base_fingerprint: str | None = None
    adapter_digest: str | None = None

    @property
    def of_base(self) -> WantedModel:
        """The model without its adapter."""
        assert self.base_fingerprint is not None
        return WantedModel(self.name, self.base_fingerprint, self.engine, self.dtype)

    @property
    def has_unembedding_of_base(self) -> bool:
        """Whether the adapter is the one that was captured, and changes numbered layers alone."""
        if self.adapter is None or self.base_fingerprint is None:
            return False
        try:
            adapter = given_adapter(self.adapter, self.name)
            return digest_of(adapter) == self.adapter_digest and is_within_layers(adapter)
        except (ModelError, OSError, SafetensorError):
            return False


def load_unembedding(wanted: WantedModel, device: str = "auto") -> Model:
    """A model with the `unembed` of the wanted model; it may have fewer layers.

    Raises `ModelError` if the model cannot be loaded, or has changed.
    """
    if wanted.has_unembedding_of_base:
        return load_unembedding(wanted.of_base, device)
    found = None if wanted.adapter else _with_one_layer(wanted, device)
    if found is None:
        options: dict[str, Any] = {} if wanted.adapter is None else {"adapter": wanted.adapter}
        found = load_model(wanted.name, wanted.engine, device, wanted.dtype, check=False, **options)
    if found.fingerprint != wanted.fingerprint:
        raise ModelError(
            f"model {wanted.name!r} has the fingerprint {found.fingerprint} now, but the capture is from "
            f"{wanted.fingerprint}: capture it again, or leave out the next-token distributions with --no-kl"
        )
    return found


def _with_one_layer(wanted: WantedModel, device: str) -> Model | None:
    """The model with its first layer alone; `None` where the checkpoint's layout does not allow it."""
    with quiet_loading():
        source = source_of(wanted.name)
        if adapter_of(source) is not None:
            return None
        whole = fetch(wanted.name, "AutoConfig", source)
        if getattr(whole, "quantization_config", None) is not None or is_dequantised(whole):
            return None
        found = _fingerprint(whole, Path(source))
        if found != wanted.fingerprint:
            return None
        try:
            return _loaded(wanted, source, whole, pick_device(device))
        except (ModelError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            return None


def _loaded(wanted: WantedModel, source: str, whole: Any, device: torch.device) -> Model | None:
    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager", "output_loading_info": True}
    model, info = fetch(wanted.name, auto_class_of(whole), source, config=_of_one_layer(whole), **options)
    if info.get("missing_keys") or info.get("mismatched_keys"):
        return None
    cast(model, DTYPES[wanted.dtype])
    return from_hugging_face(
        text_model_of(model),
        fetch_tokenizer(wanted.name, source),
        name=wanted.name,
        engine=wanted.engine,
        device=str(device),
        checkpoint_fingerprint=wanted.fingerprint,
    )


def _of_one_layer(config: Any) -> Any:
    """A config with one layer; lists with an entry for each layer are cut too."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    n_layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == n_layers > 1:
            setattr(text, name, value[:1])
    text.num_hidden_layers = 1
    return found


def _fingerprint(config: Any, folder: Path) -> str | None:
    """The fingerprint of a checkpoint, from a few numbers of each weight; `None` if its files have other names."""
    import transformers

    with torch.device("meta"):
        model = text_model_of(getattr(transformers, auto_class_of(config)).from_config(config))
    dtype = getattr(config, "dtype", None)
    files = _files(folder)
    expected = dict(model.named_parameters())
    if files is None or any(name not in files for name in expected):
        return None
    with ExitStack() as stack:
        return fingerprint_of(_read(stack, folder, files, sorted(expected), dtype))


def _read(
    stack: ExitStack, folder: Path, files: dict[str, str], names: list[str], dtype: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name, whose files are mapped into memory."""
    from safetensors import safe_open

    opened: dict[str, Any] = {}
    for name in names:
        if files[name] not in opened:
            opened[files[name]] = stack.enter_context(safe_open(folder / files[name], framework="pt"))
        weight = opened[files[name]].get_tensor(name)
        yield name, weight if dtype is None or weight.dtype == dtype else weight.to(dtype)


def _files(folder: Path) -> dict[str, str] | None:
    """The file of each weight in a folder of safetensors; `None` for any other folder."""
    from safetensors import safe_open

    try:
        if (folder / _INDEX).is_file():
            return dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        with safe_open(folder / _SINGLE, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), _SINGLE)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
