"""Finding checkpoints, reading their unprocessed weights, and computing their fingerprints."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tlcapture.errors import ModelError
from tlcapture.models import embedded
from tlcapture.models.processes import no_processes
from tlcapture.models.sources import source_of

__all__ = ["cast", "count_parameters", "fetch", "fetch_weights", "fingerprint", "quiet_loading", "source_of"]

_UNQUANTISED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fetch(name: str, kind: str, source: str, **options: Any) -> Any:
    """Call `from_pretrained(source)` of the transformers class `kind`; never runs code of the checkpoint.

    Raises `ModelError`, naming the model `name`, if it fails.
    """
    import transformers

    try:
        # Explicit, because transformers otherwise asks whether to run the code of a checkpoint.
        with no_processes():
            return getattr(transformers, kind).from_pretrained(source, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for invalid folders
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model {name!r} cannot be loaded: expected {embedded.NAME!r}, a folder of Hugging Face weights or the "
            f"name of a model on the hub: {reason[:300]}"
        ) from None


def fetch_weights(name: str, source: str, *, n_devices: int = 1) -> Any:
    """The Hugging Face model in its checkpoint's dtype, in main memory or distributed over CUDA devices.

    Raises `ModelError` if the checkpoint lacks weights.
    """
    model, found = fetch(
        name,
        "AutoModelForCausalLM",
        source,
        dtype="auto",
        attn_implementation="eager",  # the only implementation that returns attention patterns
        output_loading_info=True,
        **_over(n_devices),
    )
    missing = sorted(map(str, [*found.get("missing_keys", ()), *found.get("mismatched_keys", ())]))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"model {name!r} is incomplete: its checkpoint has no fitting {', '.join(missing[:3])}{more}; they would "
            "be initialised at random"
        )
    return model


def _over(n_devices: int) -> dict[str, Any]:
    """Options of `from_pretrained` that distribute a model over the first devices, within their free memory."""
    if n_devices == 1:
        return {}
    free = {device: torch.cuda.mem_get_info(device)[0] for device in range(n_devices)}
    return {"device_map": "balanced", "max_memory": free}


def count_parameters(config: Any) -> int:
    """Number of parameters of a Hugging Face config, tied ones counted once. Allocates no memory for them."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights in place.

    Buffers, such as rotary frequencies, keep their precision, and packed weights of quantised checkpoints stay packed.
    """
    for weight in model.parameters():
        if weight.dtype in _UNQUANTISED:
            weight.data = weight.data.to(dtype)


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that identify a checkpoint: a hash over names, shapes and samples of all weights.

    `load_model` computes it before casting the weights, so that it does not depend on the compute dtype.
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
    """Suppress progress bars and deprecation warnings of the libraries."""
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
