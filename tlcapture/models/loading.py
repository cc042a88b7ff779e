"""Loading a model with unprocessed weights, and choosing the engine that runs it.

    model = load_model("smollm2")
    state = model.start(batch_size=1)
    step = model.step(tokens, mask, state, hooks={"blocks.5.hook_resid_post"}, want_logits=True)

Engine `hooked` is TransformerLens's HookedTransformer, `bridge` its TransformerBridge around the Hugging Face model.
Both use the same hook names. Neither folds nor centres the checkpoint's weights, so every residual equals Hugging
Face's at the same point. `engines/` contains the differences between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tlcapture.errors import ModelError, warn_user
from tlcapture.models.checkpoints import embedded
from tlcapture.models.checkpoints.adapters import Adapter, digest_of, given_adapter, merged, other_base
from tlcapture.models.checkpoints.checkpoint import (
    cast,
    fetch_config,
    fetch_tokenizer,
    fetch_weights,
    fingerprint,
    quiet_loading,
    weight_folders,
)
from tlcapture.models.checkpoints.finite_weights import unusable_weights
from tlcapture.models.checkpoints.quantised import refused_in_one_line
from tlcapture.models.checkpoints.sources import commit_of, source_of
from tlcapture.models.checkpoints.text_models import text_model_of
from tlcapture.models.engines.base import Model
from tlcapture.models.engines.bridge import bridge_model, from_transformer_bridge
from tlcapture.models.engines.hooked import (
    FAST,
    from_hooked_transformer,
    has_hooked_transformer,
    hooked_model,
    require_hooked_transformer,
    why_no_hooked_transformer,
)
from tlcapture.models.engines.hooked_config import architecture_of, covers
from tlcapture.models.lazy_model import LazyModel
from tlcapture.models.quick_check import PassedCheck, QuickReference, quick_check
from tlcapture.models.sizes import Measures
from tlcapture.text import first_line

__all__ = [
    "Model",
    "as_model",
    "from_hooked_transformer",
    "from_hugging_face",
    "from_transformer_bridge",
    "load_model",
    "outline_model",
]

ENGINES = ("auto", "hooked", "bridge")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOutline:
    """A model's tokenizer and sizes, without its weights."""

    tokenizer: Any
    measures: Measures

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.measures.n_layers


def outline_model(name: str, adapter: str | None = None) -> ModelOutline:
    """Read the config and tokenizer of a model, with an adapter; raises `ModelError` if one is not found."""
    with quiet_loading():
        source = source_of(name, weights=False)
        own = None if adapter is None else given_adapter(adapter, source).tokenizer_source
        return ModelOutline(fetch_tokenizer(name, own or source), Measures.of(fetch_config(name, source)))


def load_model(
    name: str = embedded.NAME,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    *,
    adapter: str | None = None,
    source: str | Path | None = None,
    adapter_source: str | Path | None = None,
    n_devices: int = 1,
    fast: bool = FAST,
    check: bool = True,
    warn: Callable[[str], None] | None = None,
) -> Model:
    """Load a model with the unprocessed weights of its checkpoint.

        model = load_model("smollm2")
        model.n_layers, model.d_model

    From a checkpoint with other parts, such as one for images, the text model is taken. An adapter is merged.

    Args:
        name: `smollm2` (the embedded model), a local folder of Hugging Face weights or of an adapter, a GGUF file, or a
            hub name, with a revision if it is `name@revision`.
        engine: `hooked`, `bridge`, or `auto`, which is `hooked` if TransformerLens has it (version 3) and it supports
            the architecture.
        device: `cuda`, `mps`, `cpu` (or any torch device), or `auto`, the first of these that is available.
        dtype: `float32`, `float16`, `bfloat16`, or `auto`, the checkpoint's dtype on an accelerator and
            float32 on a CPU.
        adapter: a folder with a LoRA or another PEFT adapter, which is merged into the model's weights with peft.
        source, adapter_source: the folders with the files of either, if they cannot be found by their names.
        n_devices: the number of CUDA devices that the model is distributed over, in one process.
        fast: whether a HookedTransformer has the forward pass of `tlcapture.models.fast`; the default is `False`
            with the environment variable `TLCAPTURE_FAST=0`.
        check: whether to compare a short prompt with Hugging Face's own forward pass, once per checkpoint and versions.
        warn: called with what to know before relying on the model; the default is `warnings.warn`.

    Raises:
        ModelError: the model is not found, the engine does not support it or computes something other than Hugging
            Face, a package is missing, or there are too few devices.
    """
    target = pick_device(device)
    check_devices(n_devices, target)
    notes: list[str] = []  # passed on below, since `quiet_loading` suppresses warnings
    with quiet_loading():
        folder = source_of(name) if source is None else str(source)
        notes += embedded.notes_on(Path(folder))
        merging = None if adapter is None else given_adapter(str(adapter_source or adapter), folder)
        config = fetch_config(name, folder)
        chosen = pick_engine(name, engine, config)
        tokenizer = fetch_tokenizer(name, folder if merging is None else merging.tokenizer_source)
        with refused_in_one_line(config, name):
            whole = fetch_weights(name, folder, n_devices=n_devices if chosen == "bridge" else 1, warn=notes.append)
            adapted: dict[str, str] = {}
            if merging is not None and adapter is not None:
                before = fingerprint(text_model_of(whole))
                adapted = {"adapter": adapter, "adapter_digest": digest_of(merging), "base_fingerprint": before}
                notes += _note_on_base(merging, name)
                whole = merged(whole, merging, name)
            model = text_model_of(whole)
            model.config._commit_hash = commit_of(folder)
            identity = fingerprint(model)
            cast(whole, pick_dtype(dtype, target, config))
            placing: dict[str, Any] = {"device": str(target), "n_devices": n_devices, "fast": fast}
            passed = PassedCheck.of(model.config, **placing, engine=chosen, dtype=model.dtype, fingerprint=identity)
            reference = None
            if check and not passed.exists():
                reference = _reference(whole, name, weight_folders(name, folder), notes.append)
            del whole  # so that an engine that copies the weights frees them
            loaded = from_hugging_face(
                model, tokenizer, name=name, engine=chosen, checkpoint_fingerprint=identity, **placing
            )
            loaded.adapted = adapted
            if reference is not None:
                quick_check(loaded, reference)
                passed.remember()
    for note in notes:
        (warn or warn_user)(note)
    return loaded


def _note_on_base(adapter: Adapter, name: str) -> list[str]:
    """What to know about an adapter that says that it is for another model."""
    other = other_base(replace(adapter, base=name))
    if other is None:
        return []
    return [f"adapter {adapter.source!r} says that it is for {other!r}: it is merged into {name!r}"]


def _reference(hf_model: Any, name: str, folders: Sequence[Path], warn: Callable[[str], None]) -> QuickReference | None:
    """Hugging Face's run of the short prompt; `None`, with a warning, if it cannot run it.

    Raises `ModelError` if that gives NaN or infinity because the weights, whose files are in `folders`, hold such
    numbers. They are looked for only then: reading all weights takes 3 to 10 % of a load.
    """
    try:
        found = QuickReference.of(hf_model.eval())
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, MemoryError) as error:
        warn(f"model {name!r} is not compared with Hugging Face, whose own forward pass failed: {first_line(error)}")
        return None
    if not found.is_finite and (reason := unusable_weights(hf_model, folders)):
        raise ModelError(f"model {name!r} cannot be used: {reason}")
    return found


def from_hugging_face(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    engine: str = "auto",
    device: str = "cpu",
    n_devices: int = 1,
    checkpoint_fingerprint: str | None = None,
    fast: bool = FAST,
) -> Model:
    """A `Model` from a Hugging Face model that is already in memory. The two may share weights.

    Args:
        engine, device, n_devices, fast: see `load_model`.
        checkpoint_fingerprint: the fingerprint, if the weights have been cast since it was computed.

    Raises `ModelError` if the engine does not support the model.
    """
    config = model.config
    config.architectures = [type(model).__name__]
    chosen = pick_engine(name, engine, config)
    model = model.eval().requires_grad_(False)
    identity = {"name": name, "checkpoint_fingerprint": checkpoint_fingerprint or fingerprint(model)}
    with quiet_loading():
        if chosen == "hooked":
            return hooked_model(model, tokenizer, **identity, device=device, n_devices=n_devices, fast=fast)
        return bridge_model(model, tokenizer, **identity, device=device)


def as_model(model: Any) -> Model:
    """A `Model` from a `Model`, a `LazyModel`, a name to load, a HookedTransformer or a TransformerBridge.

    Raises `ModelError` for anything else.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, LazyModel):
        return model.load()
    if isinstance(model, str):
        return load_model(model)
    # Compared by name, because TransformerLens 4 has no HookedTransformer to import.
    kinds = {kind.__name__ for kind in type(model).mro()}
    if "HookedTransformer" in kinds:
        return from_hooked_transformer(model)
    if "TransformerBridge" in kinds:
        return from_transformer_bridge(model)
    raise ModelError(
        "expected a model that load_model returns, a name that it accepts, a HookedTransformer or a TransformerBridge, "
        f"got {type(model).__name__}"
    )


def pick_engine(name: str, engine: str, config: Any) -> str:
    """The engine that runs a model; raises `ModelError`, with the reason, if the requested one cannot."""
    if engine not in ENGINES:
        raise ModelError(f"no engine {engine!r}: choose one of {', '.join(ENGINES)}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {name!r} has an encoder and a decoder ({architecture_of(config)}): expected one that continues its "
            "own text"
        )
    if engine == "bridge" or (engine == "auto" and not has_hooked_transformer()):
        return "bridge"
    require_hooked_transformer()
    reason = covers(config)
    if reason is None:
        return "hooked"
    if engine == "auto":
        return "bridge"
    raise ModelError(f"engine 'hooked' does not cover {name!r}: {reason}; use --engine bridge")


def why_bridge(config: Any) -> str:
    """Why `auto` takes the engine `bridge` for a model."""
    return why_no_hooked_transformer() or f"engine hooked does not cover it: {covers(config)}"


def pick_device(device: str) -> torch.device:
    """The requested device; `auto` is the first available of CUDA, MPS and CPU.

    Raises `ModelError` for a device that cannot be used.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_devices(n_devices: int, device: torch.device) -> None:
    """Raise `ModelError` if a model cannot be distributed over `n_devices` devices."""
    available = torch.cuda.device_count()
    if n_devices > 1 and (device.type != "cuda" or available < n_devices):
        raise ModelError(
            f"--n-devices {n_devices}: requires that many CUDA devices, found {available} (using {device})"
        )


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """The requested dtype; `auto` is float32 on a CPU and the checkpoint's dtype elsewhere.

    Raises `ModelError` for an unknown dtype.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"no dtype {dtype!r}: choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    own = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" or own is None else own
