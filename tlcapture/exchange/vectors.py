"""Vectors as safetensors, and as GGUF control vectors for llama.cpp and repeng; what was measured of them as JSON.

vectors/{category}/{trait}.safetensors            every vector, in float32; the records of their origin in the header
vectors/{category}/{trait}.{method}.gguf          residual vectors by layer, as control vectors
vectors/reference.safetensors                     mean activations on the packaged prompts
evaluation.json, steering/{category}/{trait}.json, config.json
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlcapture.errors import StorageError
from tlcapture.names import Trait, is_safe_name
from tlcapture.storage.files import Written, read_bytes, read_tensors, write_bytes, write_tensors
from tlcapture.storage.layout import Layout
from tlcapture.traits.reference import Reference, read_reference
from tlcapture.traits.vector_files import IMPORTED, VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector

COMPONENTS = ("residual", "attn_out")
_HEADER = "tlcapture"  # the key of what is not a tensor in the header of a safetensors file
_ARCHITECTURE = "controlvector"


@dataclass(frozen=True)
class ExportedVectors:
    """What was exported of an experiment's vectors, and what could not be, with its reason."""

    traits: tuple[str, ...]
    n_vectors: int
    left_out: tuple[str, ...]


def export_vectors(layout: Layout, folder: Path, model_type: str) -> ExportedVectors:
    """Write all vectors of an experiment below a folder, and what `extract`, `evaluate` and `steer` stored of them.

    `model_type` is what GGUF files name as the architecture that they are for, such as `llama`.

    Raises `VectorError` or `StorageError` for a damaged file.
    """
    traits, left_out, n_vectors = [], [], 0
    for trait in layout.traits():
        files = VectorFiles(layout, trait)
        vectors = dict(_vectors(files))
        if not vectors:
            continue
        path = folder / "vectors" / trait.category / f"{trait.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**vectors, **_means(files)}, path, {_HEADER: _json(_origins(files))})
        left_out += _control_vectors(files, path.parent, model_type)
        traits.append(str(trait))
        n_vectors += len(vectors)
    _export_reference(layout, folder)
    for source, name in _measured(layout):
        if source.is_file():
            write_bytes(folder / name, read_bytes(source))
    return ExportedVectors(tuple(traits), n_vectors, tuple(dict.fromkeys(left_out)))


def restore_vectors(layout: Layout, folder: Path) -> list[Written]:
    """Write the vectors of an export to an experiment, and what was stored of them.

    Evaluation and steering recognise vectors by a digest of their files. Where a file written now has another one than
    the exported file had, it takes that one's place.

    Raises `StorageError` for a damaged file.
    """
    written: list[Written] = []
    digests: dict[str, str] = {}
    for path in sorted(folder.glob("vectors/*/*.safetensors")):
        if not (is_safe_name(path.parent.name) and is_safe_name(path.stem)):
            raise StorageError(f"{path}: not the name of a trait")
        files = VectorFiles(layout, Trait(path.parent.name, path.stem))
        tensors, origins = _read(path)
        written += _restore_trait(path, files, tensors, origins, digests)
    written += _restore_reference(layout, folder)
    for target, name in _measured(layout, folder):
        source = folder / name
        if source.is_file():
            data = read_bytes(source)
            for before, after in digests.items():
                data = data.replace(before.encode(), after.encode())
            written.append(write_bytes(target, data))
    return written


def _measured(layout: Layout, folder: Path | None = None) -> Iterator[tuple[Path, str]]:
    """The JSON files of an experiment and their names in an export."""
    yield layout.config, "config.json"
    yield layout.evaluation, "evaluation.json"
    if folder is None:
        traits = layout.traits()
    else:
        traits = [Trait(path.parent.name, path.stem) for path in sorted(folder.glob("steering/*/*.json"))]
    for trait in traits:
        yield layout.steering(trait), f"steering/{trait}.json"


# -- safetensors ----------------------------------------------------------------------------------


def _vectors(files: VectorFiles) -> Iterator[tuple[str, Tensor]]:
    for component in COMPONENTS:
        for method, layers in files.available(component).items():
            for layer in layers:
                yield _key(component, method, layer), read_vector(files, component, method, layer).vector.contiguous()


def _key(component: str, method: str, layer: int) -> str:
    return f"{component}/{method}/{layer}"


def _means(files: VectorFiles) -> dict[str, Tensor]:
    """The mean activations of the training examples by component."""
    paths = {component: files.mean_file(component) for component in COMPONENTS}
    return {
        f"training_mean/{component}": read_tensors(path).contiguous()
        for component, path in paths.items()
        if path.is_file()
    }


def _origins(files: VectorFiles) -> dict[str, Any]:
    """The records of the vectors' origin, and the digests of their files."""
    records: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for component in COMPONENTS:
        for method, layers in files.available(component).items():
            digests |= {_key(component, method, layer): files.digest(component, method, layer) for layer in layers}
        for kind in (None, IMPORTED):
            if found := files.metadata(component, kind):
                records[f"{component}/{kind or 'extracted'}"] = found
    return {"metadata": records, "digests": digests}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = orjson.loads((file.metadata() or {})[_HEADER])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise StorageError(f"{path}: cannot be read as exported vectors: {error}") from None


def _restore_trait(
    path: Path, files: VectorFiles, tensors: Mapping[str, Tensor], origins: Mapping[str, Any], digests: dict[str, str]
) -> list[Written]:
    written = []
    for name, tensor in tensors.items():
        kind, component, *rest = (
            ("vector", *name.split("/")) if not name.startswith("training_mean/") else name.split("/")
        )
        if component not in COMPONENTS or len(rest) != (2 if kind == "vector" else 0):
            raise StorageError(f"{path}: {name!r} is not the name of a vector")
        if kind != "vector":
            written.append(write_tensors(files.mean_file(component), tensor.clone()))
            continue
        method, layer = rest[0], int(rest[1])
        written.append(write_vector(files, component, method, layer, tensor))
        before, after = origins.get("digests", {}).get(name), files.digest(component, method, layer)
        if before not in (None, after):
            digests[str(before)] = after
    for name, record in origins.get("metadata", {}).items():
        component, kind = name.split("/")
        files.write_metadata(component, record, IMPORTED if kind == IMPORTED else None)
    return written


def _export_reference(layout: Layout, folder: Path) -> None:
    for component in COMPONENTS:
        found = read_reference(layout, component)
        if found is None:
            continue
        path = folder / "vectors" / f"{component}_reference.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(found, name).contiguous() for name in ("prompt_means", "response_means")}
        record = {name: value for name, value in vars(found).items() if name not in tensors}
        save_file(tensors, path, {_HEADER: _json(record)})


def _restore_reference(layout: Layout, folder: Path) -> list[Written]:
    written = []
    for component in COMPONENTS:
        path = folder / "vectors" / f"{component}_reference.safetensors"
        if path.is_file():
            tensors, record = _read(path)
            written.append(Reference(**record, **tensors).write(layout, component))
    return written


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


# -- GGUF -----------------------------------------------------------------------------------------


def _control_vectors(files: VectorFiles, folder: Path, model_type: str) -> list[str]:
    """Write the residual vectors of each method as a control vector; returns what was left out.

    `direction.L` is added to the output of block L, as llama.cpp counts them, whose block 0 takes none. Lengths are the
    typical norm of the residual stream at that layer, where `extract` stored it, so that a strength of 0.2 there is
    `--steer TRAIT:+0.2` here; otherwise 1.
    """
    import gguf

    left_out = []
    for method, layers in files.available("residual").items():
        norms = typical_norms(files.metadata("residual", method))
        path = folder / f"{files.trait.name}.{method}.gguf"
        writer = gguf.GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len([layer for layer in layers if layer]))
        writer.add_string("tlcapture.length", "unit" if norms is None else "typical norm of the residual stream")
        for layer in layers:
            if layer == 0:
                left_out.append("GGUF files have no vectors of layer 0, for which llama.cpp has no place")
                continue
            vector = read_vector(files, "residual", method, layer).vector
            scale = 1.0 if norms is None else norms[layer]
            writer.add_tensor(f"direction.{layer}", (vector / vector.norm() * scale).to(torch.float32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return left_out


def typical_norms(metadata: Mapping[str, Any]) -> Mapping[int, float] | None:
    """The typical norm of the residual stream by layer, as `extract` stores it; `None` where it did not."""
    norms = metadata.get("typical_norms")
    return dict(enumerate(norms)) if norms else None
