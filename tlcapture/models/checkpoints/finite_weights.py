"""NaN and infinity: in the weights of a checkpoint or an adapter, by tensor and file; the remedy for activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcapture.models.checkpoints.files import weights_of
from tlcapture.models.checkpoints.untaken import listed
from tlcapture.text import shell_join

if TYPE_CHECKING:
    import torch

_FILES = ("*.safetensors", "*.bin")


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The names of those weights that hold NaN or infinity."""
    return [name for name, weight in weights if not _is_finite(weight)]


def unusable_weights(model: Any, folders: Iterable[Path]) -> str | None:
    """Which weights of a Hugging Face model hold NaN or infinity, in one line; `None` if all are finite.

    Args:
        folders: where the model's files may be; the first file with such weights is named, with their names there.
    """
    if not (names := not_finite(model.named_parameters())):
        return None
    for path in _files(folders):
        if stored := not_finite(weights_of(path)):
            return f"{path}: {not_finite_message(stored)}"
    return not_finite_message(names)


def not_finite_message(names: list[str]) -> str:
    """The message about weights that are not finite."""
    return f"{listed(names)} {'holds' if len(names) == 1 else 'hold'} NaN or infinity: expected finite weights"


def remedy(dtype: torch.dtype, model: str | None = None) -> str:
    """What to do about activations of a dtype that are NaN or infinity, computed by the model of this name."""
    import torch

    if dtype == torch.float16:
        return "try --dtype bfloat16 or float32"
    if dtype == torch.bfloat16:
        return "try --dtype float32"
    doctor = shell_join(["tlcapture", "doctor", *([] if model is None else ["--model", model])])
    return f"interventions that are too strong, or damaged weights, cause this: run '{doctor}'"


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for pattern in _FILES:
            yield from sorted(folder.glob(pattern))


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether all numbers are finite; packed types are not looked at. A sum is five times as fast as `isfinite`."""
    import torch

    if not weight.is_floating_point() or weight.element_size() < 2:
        return True
    total = weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    return bool(total.isfinite()) or bool(weight.detach().isfinite().all())
