"""Vectors as safetensors, and as GGUF control vectors for llama.cpp and repeng; their measures as JSON.

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
from safetensors.torch import save_file
from torch import Tensor

from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_bytes, read_tensors, write_bytes
from tlcapture.traits.statistics.reference import read_reference
from tlcapture.traits.vector_files import IMPORTED, VectorFiles
from tlcapture.traits.vector_sources.exported import HEADER, key, measured
from tlcapture.traits.vector_sources.other_tools import LENGTH
from tlcapture.traits.vectors import read_vector
from tlcapture.views.hooks import COMPONENTS

_ARCHITECTURE = "controlvector"


@dataclass(frozen=True)
class ExportedVectors:
    """The exported vectors, those that could not be exported with the reasons, and the files that an import reads."""

    traits: tuple[str, ...]
    n_vectors: int
    left_out: tuple[str, ...]
    files: tuple[str, ...]


def export_vectors(layout: Layout, folder: Path, model_type: str) -> ExportedVectors:
    """Write all vectors of an experiment below a folder, and the files of `extract`, `evaluate` and `steer` about them.

    `model_type` is the architecture named in GGUF files, such as `llama`.

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
        save_file({**vectors, **_means(files)}, path, {HEADER: _json(_origins(files))})
        left_out += _control_vectors(files, path.parent, model_type)
        traits.append(str(trait))
        n_vectors += len(vectors)
    _export_reference(layout, folder)
    for source, name in measured(layout):
        if source.is_file():
            write_bytes(folder / name, read_bytes(source))
    written = [*(folder / "vectors").rglob("*.safetensors")]
    written += [folder / name for _, name in measured(layout)]
    names = sorted(path.relative_to(folder).as_posix() for path in written if path.is_file())
    return ExportedVectors(tuple(traits), n_vectors, tuple(dict.fromkeys(left_out)), tuple(names))


# -- safetensors ----------------------------------------------------------------------------------


def _vectors(files: VectorFiles) -> Iterator[tuple[str, Tensor]]:
    for component in COMPONENTS:
        for method, layers in files.available(component).items():
            for layer in layers:
                yield key(component, method, layer), read_vector(files, component, method, layer).vector.contiguous()


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
            digests |= {key(component, method, layer): files.digest(component, method, layer) for layer in layers}
        for kind in (None, IMPORTED):
            if found := files.metadata(component, kind):
                records[f"{component}/{kind or 'extracted'}"] = found
    return {"metadata": records, "digests": digests}


def _export_reference(layout: Layout, folder: Path) -> None:
    for component in COMPONENTS:
        found = read_reference(layout, component)
        if found is None:
            continue
        path = folder / "vectors" / f"{component}_reference.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(found, name).contiguous() for name in ("prompt_means", "response_means")}
        record = {name: value for name, value in vars(found).items() if name not in tensors}
        save_file(tensors, path, {HEADER: _json(record)})


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


# -- GGUF -----------------------------------------------------------------------------------------


def _control_vectors(files: VectorFiles, folder: Path, model_type: str) -> list[str]:
    """Write the residual vectors of each method as a control vector; returns the vectors left out.

    `direction.L` is added to the output of block L, as llama.cpp counts them (block 0 takes none). Lengths are the
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
        writer.add_string(LENGTH, "unit" if norms is None else "typical norm of the residual stream")
        for layer in layers:
            if layer == 0:
                left_out.append("GGUF files have no vectors of layer 0, which llama.cpp does not read")
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
