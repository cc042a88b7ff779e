"""Pickles that would run code are refused without being executed, whatever their path and format."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evidence import Evidence
from tests.input import captures
from tests.input.strategies import check_refusal
from tlcapture.captures.capture import Capture
from tlcapture.errors import ModelError, StorageError
from tlcapture.models.checkpoints import embedded
from tlcapture.models.loading import load_model
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_tensors
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import read_vector

TRAIT = Trait("style", "odd")


class Harmful:
    """An object whose unpickling creates a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


class HarmfulState(Harmful):
    """An object whose unpickling creates a folder by calling `eval`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"__import__('os').mkdir({str(self.marker)!r})",))


def as_torch_file(value: Any, path: Path) -> None:
    torch.save(value, path)


def as_bare_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def as_old_torch_file(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def as_zip_of_pickles(value: Any, path: Path) -> None:
    """Write an archive of which every member is the pickle."""
    torch.save({"x": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps(value))


FORMATS: list[Callable[[Any, Path], None]] = [as_torch_file, as_bare_pickle, as_old_torch_file, as_zip_of_pickles]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "harmed"


def test_the_pickles_run_code_when_loaded_without_protection(tmp_path: Path) -> None:
    for number, kind in enumerate((Harmful, HarmfulState)):
        marker = tmp_path / str(number)
        as_torch_file(kind(marker), tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert marker.is_dir()


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("kind", [Harmful, HarmfulState])
def test_harmful_captures_vectors_and_internals_are_refused(
    tmp_path: Path, marker: Path, evidence: Evidence, kind: type[Harmful], write: Callable[[Any, Path], None]
) -> None:
    layout = Layout(tmp_path, "exp")
    raw, internals = layout.residual("odd", "1"), layout.internals("odd", "1", 0)
    vector = VectorFiles(layout, TRAIT).file("residual", "probe", 1)
    for path in (raw, internals, vector):
        path.parent.mkdir(parents=True)
    write({**captures.content(), "extra": kind(marker)}, raw)
    write({"blocks.0.hook_resid_pre": torch.ones(1), "extra": kind(marker)}, internals)
    write(kind(marker), vector)
    readers: list[tuple[Path, Callable[[], object]]] = [
        (raw, lambda: Capture.open(raw)),
        (internals, lambda: read_tensors(internals)),
        (vector, lambda: read_vector(VectorFiles(layout, TRAIT), "residual", "probe", 1)),
    ]
    for path, read in readers:
        with pytest.raises(StorageError) as caught:
            read()
        check_refusal(caught.value, path)
        evidence.tried("pickle that runs code", path.parent.name if path == vector else path.parents[1].name)
    assert not marker.exists()


def without_weights(folder: Path, target: Path) -> Path:
    """A copy of a model's folder without its weights."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        path.unlink()
    return target


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("write", FORMATS)
def test_harmful_weights_of_a_model_folder_are_refused(
    tmp_path: Path, tiny_folder: Path, marker: Path, evidence: Evidence, name: str, write: Callable[[Any, Path], None]
) -> None:
    folder = without_weights(tiny_folder, tmp_path / "model")
    write({"lm_head.weight": Harmful(marker), "x": torch.ones(3)}, folder / name)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu")
    check_refusal(caught.value, folder)
    assert not marker.exists()
    evidence.tried("pickle that runs code", "weights of a model")


def test_other_files_of_a_model_folder_are_not_opened(
    tmp_path: Path, tiny_folder: Path, marker: Path, evidence: Evidence
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "vocab.pkl"):
        as_torch_file(Harmful(marker), folder / name)
        evidence.tried("pickle that runs code", "other files of a model")
    assert load_model(str(folder), device="cpu").n_layers == 3
    assert not marker.exists()


def test_custom_code_of_a_checkpoint_is_never_run_or_offered(
    tmp_path: Path, tiny_folder: Path, marker: Path, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    questions: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "n")
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "modeling_own.py").write_text(f"import os; os.mkdir({str(marker)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="comes with code of its own, which is never run: use weights of") as caught:
        load_model(str(folder), device="cpu")
    check_refusal(caught.value, folder)
    assert not questions
    assert not marker.exists()
    evidence.tried("pickle that runs code", "code of a checkpoint")


# -- the folder of the converted model -----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a tiny model in place of the converted embedded model."""
    source = tmp_path / "package" / "tiny.gguf"
    source.parent.mkdir()
    source.write_bytes(b"gguf")
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "gguf_file", lambda: source)

    def convert(source: Path, target: Path) -> None:
        shutil.copytree(tiny_folder, target, dirs_exist_ok=True)

    monkeypatch.setattr(embedded, "_convert_weights", convert)
    return embedded.embedded_folder()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _overwrite_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10:] = bytes(10)
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated weights": lambda folder, marker: _truncate(folder / "model.safetensors"),
    "weights of another model": lambda folder, marker: _overwrite_end(folder / "model.safetensors"),
    "missing weights": lambda folder, marker: (folder / "model.safetensors").unlink(),
    "truncated config": lambda folder, marker: _truncate(folder / "config.json"),
    "empty config": lambda folder, marker: (folder / "config.json").write_text(""),
    "another config": lambda folder, marker: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
    "truncated tokenizer": lambda folder, marker: _truncate(folder / "tokenizer.json"),
    "an extra pickle": lambda folder, marker: as_torch_file(Harmful(marker), folder / "pytorch_model.bin"),
    "an extra program": lambda folder, marker: (folder / "modeling_own.py").write_text("x = 1"),
    "missing record": lambda folder, marker: (folder / "converted.json").unlink(),
    "damaged record": lambda folder, marker: (folder / "converted.json").write_text("["),
    "no files": lambda folder, marker: [path.unlink() for path in folder.iterdir()],
}


def test_the_converted_model_loads(cache: Path) -> None:
    assert load_model(embedded.NAME, device="cpu").n_layers == 3


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_or_foreign_converted_model_is_refused(
    cache: Path, marker: Path, evidence: Evidence, damage: str
) -> None:
    DAMAGES[damage](cache, marker)
    with pytest.raises(ModelError, match="remove the folder to convert it again") as caught:
        load_model(embedded.NAME, device="cpu")
    check_refusal(caught.value, cache)
    assert not marker.exists()
    shutil.rmtree(cache)
    assert load_model(embedded.NAME, device="cpu").n_layers == 3
    evidence.tried("folder of the converted model", damage)
