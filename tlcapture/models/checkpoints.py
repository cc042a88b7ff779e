"""Checkpoints: finding them, reading their weights unprocessed, and telling them apart."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tlcapture.errors import ModelError
from tlcapture.models import embedded

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of weights that stand for themselves


def source_of(name: str) -> str:
    """Where the weights are: a folder, or a hub name."""
    if name == embedded.NAME:
        return str(embedded.embedded_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: no folder of Hugging Face weights: it has no config.json")
        return str(folder)
    return name


def fetch(name: str, kind: str, source: str, **options: Any) -> Any:
    import transformers

    try:
        # Asked for by a checkpoint, its own code would be offered to be run.
        return getattr(transformers, kind).from_pretrained(source, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # a foreign folder can be wrong in every way
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model {name!r} cannot be loaded: expected {embedded.NAME!r}, a folder of Hugging Face weights or the "
            f"name of a model on the hub: {reason[:300]}"
        ) from None


def fetch_weights(name: str, source: str, *, n_devices: int = 1) -> Any:
    """The Hugging Face model in its checkpoint's own dtype, in main memory or over several CUDA devices.

    Raises `ModelError` where weights are missing.
    """
    model, found = fetch(
        name,
        "AutoModelForCausalLM",
        source,
        dtype="auto",
        attn_implementation="eager",  # the only one that hands out attention patterns
        output_loading_info=True,
        **_over(n_devices),
    )
    lacking = sorted(map(str, [*found.get("missing_keys", ()), *found.get("mismatched_keys", ())]))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ModelError(
            f"model {name!r} is incomplete: its checkpoint has no fitting {', '.join(lacking[:3])}{more}; random "
            "numbers would take their place"
        )
    return model


def _over(n_devices: int) -> dict[str, Any]:
    """How Hugging Face is asked to spread a model: over the first devices, as much on each as is free there."""
    if n_devices == 1:
        return {}
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(n_devices)}
    return {"device_map": "balanced", "max_memory": free}


def count_parameters(config: Any) -> int:
    """Weights of the model that a Hugging Face config describes, tied ones once. Makes none of them."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights and nothing else: buffers, such as rotary frequencies, keep their precision, and what
    a quantised checkpoint packs into its weights stays packed."""
    for weight in model.parameters():
        if weight.dtype in _NUMBERS:
            weight.data = weight.data.to(dtype)


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that tell checkpoints apart: a hash over names, shapes and samples of all weights.

    `load_model` takes it before the weights are cast, so that the compute dtype does not matter.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().flatten() if weight.is_contiguous() else weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep progress bars and deprecation notes of the libraries off the user's terminal."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    level = hf_logging.get_verbosity()
    root = logging.getLogger()
    root_level = root.level
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(root_level)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
