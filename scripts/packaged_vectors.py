"""Writes the vectors that come with the package from an experiment whose vectors were extracted and evaluated.

    python scripts/packaged_vectors.py ROOT EXPERIMENT

Of each trait, those by the selected method are kept, at every layer, with the records of their origin, the scores that
selected them, and the reference. What is subtracted or averaged before it counts is written in float16.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tlcapture.exchange.vectors import export_vectors
from tlcapture.names import Trait
from tlcapture.storage.experiments.config import update_config
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, write_json
from tlcapture.traits.missing_vectors import PACKAGED
from tlcapture.traits.selection import select
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.packaged import packaged_files


def main(root: Path, experiment: str) -> None:
    """Replace the packaged vectors by those of an experiment."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Layout(Path(folder), PACKAGED)
        methods = _keep(Layout(root, experiment), kept)
        update_config(kept, extraction_model="smollm2", inference_model="smollm2")
        target = packaged_files()
        shutil.rmtree(target, ignore_errors=True)
        export_vectors(kept, target, "llama")
    for path in target.rglob("*.gguf"):
        path.unlink()
    for path in target.rglob("*.safetensors"):
        _halve(path)
    for trait, method in methods.items():
        print(f"{trait}: {method}")


def _keep(source: Layout, kept: Layout) -> dict[str, str]:
    """Copy the selected vectors of all traits; returns the method of each."""
    shutil.copytree(
        source.folder / "extraction", kept.folder / "extraction", ignore=shutil.ignore_patterns("activations")
    )
    methods = {}
    for trait in kept.traits():
        files = VectorFiles(kept, trait)
        method = select(files, "residual", files.metadata("residual")["num_layers"]).method
        files.remove_all("attn_out", files.available("attn_out"), range(1000))
        for path in files.path.glob("*_layer*.pt"):
            if not path.name.startswith(f"{method}_layer"):
                path.unlink()
        files.write_metadata("residual", _of_method(read_json(files.metadata_file("residual")), method))
        methods[str(trait)] = method
    evaluation = read_json(kept.evaluation)
    rows = [row for row in evaluation["all_results"] if _is_kept(row, methods)]
    for row in rows:
        row.pop("cosine_to_methods", None)  # vectors that are left out
    write_json(kept.evaluation, {**evaluation, "all_results": rows, "carry_over": {}})
    return methods


def _is_kept(row: dict[str, Any], methods: dict[str, str]) -> bool:
    return row["component"] == "residual" and methods.get(str(Trait.parse(row["trait"]))) == row["method"]


def _of_method(metadata: dict[str, Any], method: str) -> dict[str, Any]:
    by_method = {
        name: {method: value[method]} for name, value in metadata.items() if isinstance(value, dict) and method in value
    }
    return {**metadata, **by_method, "methods": [method], "extraction_experiment": PACKAGED}


def _halve(path: Path) -> None:
    """Write means in float16, in which they keep three digits; vectors stay as they are."""
    with safe_open(path, framework="pt") as file:
        record, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    means = {name: tensor.to(torch.float16) for name, tensor in tensors.items() if "mean" in name.split("/")[0]}
    if not all(tensor.isfinite().all() for tensor in means.values()):
        raise ValueError(f"{path}: too large for float16")
    save_file({**tensors, **means}, path, record)
    path.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
