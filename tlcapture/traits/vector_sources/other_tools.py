"""Vector files of other tools, read as vectors by the layer number that the tool gave them.

| file | what is read |
| --- | --- |
| persona-vectors' `.pt` | a tensor `[n_layers + 1, d_model]`, whose row 0 is the embedding |
| repeng's (and llama.cpp's) GGUF control vector | `direction.L`: the output of block L |
| steering-vectors' object, by `torch.save` | `layer_activations[L]`: the output of block L, or of its attention |
| `.pt`, `.safetensors`, `.npz`, `.npy` | a tensor with one row per layer, or tensors by number or name of a layer |

Where each layer's vector belongs in a model is decided in `traits/vector_sources/layer_conventions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlcapture.errors import InputError, StorageError, VectorError
from tlcapture.storage.files import opening, read_tensors
from tlcapture.storage.folders import names_in
from tlcapture.storage.tensors import described, is_plain
from tlcapture.text import printable

PERSONA_VECTORS, REPENG, STEERING_VECTORS = "persona-vectors", "repeng", "steering-vectors"
LENGTH = "tlcapture.length"  # the key of GGUF control vectors that `tlcapture export` writes
_SUFFIXES = (".bin", ".gguf", ".npy", ".npz", ".pt", ".pth", ".safetensors")
_STEERING_VECTOR = "steering_vectors.steering_vector.SteeringVector"
_PARTS = {"decoder_block": "residual", "self_attn": "attn_out"}  # steering-vectors' layer types that have a place here
# Parts of a name that say which activation it is, in the order in which they are looked for.
_BETWEEN = ("resid_mid", "after_attn", "after_attention", "post_attn", "post_attention", "pre_attn", "pre_attention")
_WITHIN_ATTENTION = (
    "hook_q", "hook_k", "hook_v", "hook_z", "hook_rot", "hook_result", "hook_pattern", "q_proj", "k_proj", "v_proj",
    "qkv", "c_attn",
)  # fmt: skip
_OTHERS = ("mlp", "ffn", "feed_forward", "expert", "moe", "mixer", "ssm", "norm", "embed")
_ACTIVATIONS: dict[str, tuple[str | None, str | None] | None] = {
    **dict.fromkeys(("resid_post", "residual_out"), ("residual", "resid_post")),
    **dict.fromkeys(("resid_pre", "residual_in"), ("residual", "resid_pre")),
    "hidden_state": ("residual", "hidden_states"),
    **dict.fromkeys((*_BETWEEN, *_WITHIN_ATTENTION, *_OTHERS)),
    **dict.fromkeys(("attn", "attention"), ("attn_out", None)),
}


@dataclass(frozen=True)
class ToolVectors:
    """The vectors in a file of another tool.

    Attributes:
        tool: the tool that writes such files; `None` if several do.
        rows: tensors by the file's own number of their layer, not checked yet.
        is_table: whether they are the rows of one tensor, so that their number tells the number of the model's layers.
        component: the activation they are for, if the file says so.
        convention: the meaning of a number (a convention of `layer_conventions`), if the file says so.
        model_type: the architecture of their model, if the file says so.
    """

    tool: str | None
    rows: Mapping[int, Any]
    is_table: bool = False
    component: str | None = None
    convention: str | None = None
    model_type: str | None = None


def read_tool_vectors(path: Path) -> ToolVectors:
    """Read a vector file of another tool; no code in it is run.

    Raises:
        InputError: it is a folder.
        StorageError: the file cannot be read.
        VectorError: it does not hold vectors by layer, or holds vectors of an activation that cannot be imported.
    """
    if path.is_dir():
        names = sorted(name for name in names_in(path) if name.lower().endswith(_SUFFIXES))
        such = f", such as {printable(names[0])}" if names else ""
        raise InputError(f"{path}: expected a file of vectors, found a folder: pass a file in it{such}")
    with opening(path), path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return _of_gguf(path)
    if path.suffix.lower() == ".gguf":
        raise StorageError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
    if path.suffix.lower() == ".safetensors":
        return _of_tensors(path, _safetensors(path))
    if path.suffix.lower() in (".npz", ".npy"):
        return _of_tensors(path, _arrays(path))
    if not start.startswith(b"PK"):
        raise StorageError(
            f"{path}: not a file of vectors: expected one by torch.save, .safetensors, .npz, .npy or GGUF"
        )
    return _of_tensors(path, read_tensors(path, records=(_STEERING_VECTOR,)))


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with opening(path):
        return dict(load_file(path))


def _arrays(path: Path) -> torch.Tensor | dict[str, torch.Tensor]:
    """NumPy's arrays as tensors; those of Python objects are not opened."""
    with opening(path):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


def _of_gguf(path: Path) -> ToolVectors:
    from gguf import GGUFReader

    with opening(path):
        reader = GGUFReader(path)
        fields = {name: reader.get_field(f"{name}") for name in ("general.architecture", "controlvector.model_hint")}
        architecture, hint = (field and str(field.contents()) for field in fields.values())
        tensors = {tensor.name: _gguf_tensor(tensor) for tensor in reader.tensors}
        tool = REPENG if reader.get_field(LENGTH) is None else "tlcapture"
    if architecture != "controlvector":
        raise VectorError(f"{path}: a GGUF file of {printable(str(architecture))!r}, expected one of 'controlvector'")
    layers = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"direction\.(-?\d{1,4})", name)
        if match is None:
            raise VectorError(f"{path}: the tensor {printable(name)!r} is not named direction.L with a layer L")
        if int(match[1]) in layers:
            raise VectorError(f"{path}: {printable(name)!r} is the second entry of layer {int(match[1])}")
        layers[int(match[1])] = tensor
    return ToolVectors(tool, _some(path, layers), False, "residual", "resid_post", hint or None)


def _gguf_tensor(tensor: Any) -> Any:
    """A tensor of a GGUF file as a torch tensor; quantised ones, which no tool writes for vectors, stay as stored."""
    from gguf import GGMLQuantizationType, dequantize

    data = (
        dequantize(tensor.data, tensor.tensor_type) if tensor.tensor_type == GGMLQuantizationType.BF16 else tensor.data
    )
    return torch.from_numpy(data.copy())


def _of_tensors(path: Path, value: Any) -> ToolVectors:
    if isinstance(value, dict) and "layer_activations" in value:
        return _of_steering_vector(path, value)
    named: tuple[str | None, str | None] = (None, None)
    if isinstance(value, dict) and len(value) == 1 and getattr(next(iter(value.values())), "ndim", 1) == 2:
        ((name, table),) = value.items()
        if isinstance(name, str) and not any(map(str.isdigit, name)):  # else it is the name of a layer
            value, named = table, _named_activation(path, [name])
    if isinstance(value, list | tuple):
        return ToolVectors(None, _some(path, dict(enumerate(value))), is_table=True)
    if isinstance(value, dict):
        return _by_layer(path, value)
    if not is_plain(value) or value.ndim != 2:
        hint = "; a single vector needs its layer: save it as {layer: vector}" if getattr(value, "ndim", 0) == 1 else ""
        raise VectorError(f"{path}: expected a float tensor [n_layers, d_model], got {described(value)}{hint}")
    tool = PERSONA_VECTORS if path.stem.endswith(("_avg_diff", "_last_diff")) else None
    component, convention = named
    return ToolVectors(tool, _some(path, dict(enumerate(value))), True, component, convention)


def _of_steering_vector(path: Path, value: Mapping[str, Any]) -> ToolVectors:
    kind, layers = value.get("layer_type", "decoder_block"), value["layer_activations"]
    if not isinstance(kind, str) or kind not in _PARTS:
        raise VectorError(
            f"{path}: vectors of layer type {printable(str(kind))!r} cannot be imported: only those of decoder_block "
            "(residual_out) and self_attn (attn_out) are imported"
        )
    if not isinstance(layers, dict) or not all(type(layer) is int for layer in layers):
        raise VectorError(f"{path}: layer_activations: expected tensors by layer number")
    component = _PARTS[kind]
    convention = "resid_post" if component == "residual" else None
    return ToolVectors(STEERING_VECTORS, _some(path, layers), False, component, convention)


def _by_layer(path: Path, value: Mapping[Any, Any]) -> ToolVectors:
    """Tensors by layer numbers or by names."""
    layers: dict[int, Any] = {}
    for key, tensor in value.items():
        layer = _layer_of(path, key)
        if layer in layers:
            raise VectorError(f"{path}: {printable(str(key))!r} is the second entry of layer {layer}")
        layers[layer] = tensor
    component, convention = _named_activation(path, value)
    return ToolVectors(None, _some(path, layers), False, component, convention)


def _layer_of(path: Path, key: Any) -> int:
    if type(key) is int:
        return key
    numbers = re.findall(r"(?:(?<![A-Za-z0-9])-)?\d+", key) if isinstance(key, str) else []
    if len(numbers) != 1 or len(numbers[0]) > 5:
        raise VectorError(
            f"{path}: {printable(str(key))[:80]!r} does not hold one layer number: expected tensors by "
            "layer, with names such as 'layer_12'"
        )
    return int(numbers[0])


def _named_activation(path: Path, names: Iterable[Any]) -> tuple[str | None, str | None]:
    """Component and convention from the names of a file's tensors, such as `blocks.3.hook_resid_post`."""
    found: set[tuple[str | None, str | None]] = set()
    for name in names:
        part = next((part for part in _ACTIVATIONS if part in str(name).lower()), "")
        said = _ACTIVATIONS.get(part, (None, None))
        if said is None:
            raise VectorError(
                f"{path}: {printable(str(name))[:80]!r} names an activation that is not supported: only vectors of the "
                "residual stream and of attention outputs are imported"
            )
        found.add(said)
    if len(found) > 1:
        raise VectorError(f"{path}: its names are of several activations: import each from a file of its own")
    return found.pop() if found else (None, None)


def _some(path: Path, rows: Mapping[int, Any]) -> Mapping[int, Any]:
    if not rows:
        raise VectorError(f"{path}: no vectors in it")
    return rows
