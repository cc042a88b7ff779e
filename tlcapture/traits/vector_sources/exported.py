"""Reading vectors from the files that `export` writes: safetensors by trait, and JSON of their measures.

The form of the files is described in `exchange/vectors`, which writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from safetensors import safe_open
from torch import Tensor

from tlcapture.errors import StorageError
from tlcapture.names import Trait, is_safe_name
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, read_bytes, write_bytes, write_tensors
from tlcapture.storage.validation import of_form
from tlcapture.traits.statistics.reference import Reference
from tlcapture.traits.vector_files import IMPORTED, VectorFiles
from tlcapture.traits.vectors import write_vector
from tlcapture.views.hooks import COMPONENTS

_WHAT = "file of exported vectors"
_MEAN = "training_mean/"  # begins the names of mean activations, which a component completes
HEADER = "tlcapture"  # the key of what is not a tensor in the header of a safetensors file


def restore_vectors(layout: Layout, folder: Path) -> list[Written]:
    """Write the vectors of an export, and their measures, to an experiment.

    Evaluation and steering recognise vectors by a digest of their files. If a file written now has another digest than
    the exported file had, it replaces that one.

    Raises `StorageError` for a damaged file.
    """
    written: list[Written] = []
    digests: dict[str, str] = {}
    for path in sorted(folder.glob("vectors/*/*.safetensors")):
        if not (is_safe_name(path.parent.name) and is_safe_name(path.stem)):
            raise StorageError(f"{path}: not the name of a trait")
        files = VectorFiles(layout, Trait(path.parent.name, path.stem))
        with of_form(path, _WHAT):
            written += _restore_trait(path, files, *_read(path), digests)
    written += _restore_reference(layout, folder)
    for target, name in measured(layout, folder):
        source = folder / name
        if source.is_file():
            data = read_bytes(source)
            for before, after in digests.items():
                data = data.replace(before.encode(), after.encode())
            written.append(write_bytes(target, data))
    return written


def measured(layout: Layout, folder: Path | None = None) -> Iterator[tuple[Path, str]]:
    """The JSON files of an experiment, with their names in an export."""
    yield layout.config, "config.json"
    yield layout.evaluation, "evaluation.json"
    if folder is None:
        traits = layout.traits()
    else:
        traits = [Trait(path.parent.name, path.stem) for path in sorted(folder.glob("steering/*/*.json"))]
    for trait in traits:
        yield layout.steering(trait), f"steering/{trait}.json"


def key(component: str, method: str, layer: int) -> str:
    """The name of a vector in the safetensors file of its trait."""
    return f"{component}/{method}/{layer}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        header = orjson.loads((file.metadata() or {})[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    return tensors, header


def _restore_trait(
    path: Path, files: VectorFiles, tensors: Mapping[str, Tensor], origins: Mapping[str, Any], digests: dict[str, str]
) -> list[Written]:
    written = []
    for name, tensor in tensors.items():
        is_mean = name.startswith(_MEAN)
        component, *rest = name.removeprefix(_MEAN).split("/")
        has_rest = len(rest) == 2 and rest[1].isdecimal()
        if component not in COMPONENTS or (bool(rest) if is_mean else not has_rest):
            raise StorageError(f"{path}: {name!r} is not the name of a vector")
        if is_mean:
            written.append(write_tensors(files.mean_file(component), tensor.float().clone()))
            continue
        method, layer = rest[0], int(rest[1])
        written.append(write_vector(files, component, method, layer, tensor))
        before, after = origins.get("digests", {}).get(name), files.digest(component, method, layer)
        if before not in (None, after):
            digests[str(before)] = after
    for name, record in origins.get("metadata", {}).items():
        component, _, kind = name.partition("/")
        files.write_metadata(component, record, IMPORTED if kind == IMPORTED else None)
    return written


def _restore_reference(layout: Layout, folder: Path) -> list[Written]:
    written = []
    for component in COMPONENTS:
        path = folder / "vectors" / f"{component}_reference.safetensors"
        if path.is_file():
            with of_form(path, _WHAT):
                tensors, record = _read(path)
                found = Reference(**record, **{part: means.float() for part, means in tensors.items()})
                written.append(found.write(layout, component))
    return written
