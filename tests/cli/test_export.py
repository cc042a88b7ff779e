"""`tlcapture export` and `tlcapture import`: what others open, and the same experiment again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from safetensors import safe_open

from tlcapture.captures.capture import Capture
from tlcapture.exchange.manifest import MANIFEST, read_manifest
from tlcapture.storage.files import read_json, read_tensors

Run = Callable[..., Result]
FORMATS = ("datasets", "parquet", "safetensors", "json")
EVERYTHING = ("--activations", "all", "--points", "all")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the experiment is kept that the tests begin with, once it has been made."""
    return tmp_path_factory.mktemp("kept") / "exp"


@pytest.fixture
def made(capture: Run, extract: Run, data: Path, kept: Path) -> Path:
    """An experiment with vectors and four captures, one of them of some tokens and layers."""
    experiment = data / "experiments" / "exp"
    if kept.exists():
        return Path(shutil.copytree(kept, experiment))
    extract()
    assert capture("--capture-attn", "--temperature", 0).exit_code == 0
    only = capture("--tokens", "last", "--layers", "1,2", prompts=("--prompt-set", "other"))
    assert only.exit_code == 0, only.output
    shutil.copytree(experiment, kept)
    return experiment


@pytest.fixture
def export(tlcapture: Run, data: Path) -> Run:
    def run(*words: object) -> Result:
        return tlcapture("export", "--experiment", "exp", "--to", data / "out", *words)

    return run


def files_of(experiment: Path) -> dict[str, bytes]:
    """The files that an export carries."""
    kinds = ("inference/raw/residual/**/*.pt", "inference/*/*/*_stream/**/*.json", "extraction/**/vectors/*")
    found = [path for kind in kinds for path in experiment.glob(kind)] + [experiment / "config.json"]
    return {path.relative_to(experiment).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_exported_is_imported_equal_to_the_last_bit(
    made: Path, export: Run, tlcapture: Run, data: Path, form: str
) -> None:
    done = export("--format", form, *EVERYTHING)
    assert done.exit_code == 0, done.output
    done = tlcapture("import", data / "out", "--experiment", "again")
    assert done.exit_code == 0, done.output
    before, after = files_of(made), files_of(made.parent / "again")
    assert before.keys() == after.keys()
    for name, data_before in before.items():
        if "raw" not in name:
            assert after[name] == data_before, name
            continue
        one, other = Capture.open(made / name), Capture.open(made.parent / "again" / name)
        assert dict(one.metadata) == dict(other.metadata), name
        assert one.spans == other.spans
        for part in ("prompt", "response"):
            ours, theirs = getattr(one, part), getattr(other, part)
            assert (ours.tokens, ours.token_ids, ours.positions) == (theirs.tokens, theirs.token_ids, theirs.positions)
            assert ours.residual.points.dtype == theirs.residual.points.dtype
            assert torch.equal(ours.residual.points, theirs.residual.points)
            assert (ours.residual.attn_out is None) == (theirs.residual.attn_out is None)
            if ours.residual.attn_out is not None:
                assert torch.equal(ours.residual.attn_out, theirs.residual.attn_out)


def test_datasets_opens_the_folder_and_has_what_the_capture_has(made: Path, export: Run, data: Path) -> None:
    from datasets import load_dataset

    assert export("--activations", "2", "--prompt-set", "short").exit_code == 0
    cache = str(data / "cache")
    tokens = load_dataset(str(data / "out"), split="train", cache_dir=cache)
    capture = Capture.open(made / "inference/raw/residual/short/2.pt")
    rows = [row for row in tokens if row["file"] == "2"]
    assert [row["token"] for row in rows] == capture.tokens
    assert [row["token_id"] for row in rows] == capture.token_ids
    stored = torch.tensor([row["residual_out_L2"] for row in rows]).to(capture.residual(2).dtype)
    assert torch.equal(stored, capture.residual(2))
    projection = read_json(made / "inference/tone/loud/residual_stream/short/2.json")["projections"]
    assert [row["tone/loud"] for row in rows] == projection["prompt"] + projection["response"]
    captures = load_dataset(str(data / "out"), "captures", split="train", cache_dir=cache)
    assert [row["response"] for row in captures if row["file"] == "2"] == [capture.response.text]


def test_spans_name_the_kind_and_the_role_of_each_token(made: Path, export: Run, data: Path) -> None:
    assert export("--format", "parquet", "--prompt-set", "short").exit_code == 0
    rows = [row for row in pq.read_table(data / "out/tokens").to_pylist() if row["file"] == "1"]
    spans = Capture.open(made / "inference/raw/residual/short/1.pt").spans
    assert spans
    for span in spans:
        if span.found:
            assert {(row["span"], row["role"]) for row in rows[slice(*span.found)]} == {(span.kind, span.role)}


def test_bfloat16_is_stored_as_its_bits_and_the_card_says_so(
    capture: Run, export: Run, tlcapture: Run, data: Path
) -> None:
    assert capture("--save-dtype", "bfloat16").exit_code == 0
    assert export(*EVERYTHING).exit_code == 0
    table = pq.read_table(data / "out/tokens")
    bits = torch.tensor(table["residual_out_L1"].to_pylist(), dtype=torch.uint16).view(torch.bfloat16)
    raw = data / "experiments/exp/inference/raw/residual/short"
    assert torch.equal(bits, torch.cat([Capture.open(raw / f"{n}.pt").residual(1) for n in (1, 2, 3)]))
    assert "uint16, the bits of bfloat16" in (data / "out/README.md").read_text()
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0
    again = data / "experiments/again/inference/raw/residual/short"
    one, other = Capture.open(raw / "1.pt").residual(1), Capture.open(again / "1.pt").residual(1)
    assert other.dtype == torch.bfloat16
    assert torch.equal(one, other)


def test_captures_of_several_dtypes_come_back_in_their_own(
    capture: Run, export: Run, tlcapture: Run, data: Path
) -> None:
    capture("--save-dtype", "bfloat16")
    capture("--save-dtype", "float16", prompts=("--prompt-set", "other"))
    assert export(*EVERYTHING).exit_code == 0
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0
    for name in ("short/1", "other/1"):
        one, other = (
            Capture.open(data / f"experiments/{name_of}/inference/raw/residual/{name}.pt")
            for name_of in ("exp", "again")
        )
        assert one.prompt.residual.points.dtype == other.prompt.residual.points.dtype
        assert torch.equal(one.residual(1), other.residual(1))


def test_without_activations_projections_come_back_and_it_is_said(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    done = export()
    assert "not exported: activations" in done.output
    done = tlcapture("import", data / "out", "--experiment", "again")
    assert "4 captures came without activations" in done.output
    again = files_of(made.parent / "again")
    assert again == {name: value for name, value in files_of(made).items() if "raw" not in name}


def test_a_capture_without_activations_and_projections_is_not_said_to_be_imported(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    for file in made.glob("inference/tone/*/*_stream/short/1.json"):
        file.unlink()
    assert export().exit_code == 0
    done = tlcapture("import", data / "out", "--experiment", "again")
    assert "experiments/again: 3 captures, " in done.output
    assert "3 captures came without activations: only their projections were imported" in done.output
    assert "1 capture came with neither activations nor projections: nothing was imported of them" in done.output


def test_some_layers_come_back_as_a_capture_of_those_layers(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    assert export("--activations", "1", "--prompt-set", "short").exit_code == 0
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0
    one, other = (
        Capture.open(data / f"experiments/{name}/inference/raw/residual/short/3.pt") for name in ("exp", "again")
    )
    assert (other.kept.layers, other.kept.points) == ((1,), ("residual_out",))
    assert torch.equal(one.residual(1), other.residual(1))


def test_small_shards_hold_the_same_rows(made: Path, export: Run, tlcapture: Run, data: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tlcapture.exchange.parquet._BUFFERED", 1)
    assert export("--shard-size", "1KB", *EVERYTHING).exit_code == 0
    assert len(list((data / "out/tokens").glob("*.parquet"))) == 4
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0
    assert files_of(made.parent / "again").keys() == files_of(made).keys()


def test_control_vectors_are_as_long_as_the_typical_norm_without_layer_0(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    done = export()
    assert "GGUF files have no vectors of layer 0" in done.output
    reader = gguf.GGUFReader(path := data / "out/vectors/tone/loud.mean_diff.gguf")
    assert bytes(reader.get_field("controlvector.model_hint").parts[-1]) == b"llama"
    directions = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    metadata = read_json(made / "extraction/tone/loud/vectors/metadata.json")
    norms = dict(zip(metadata["layers"], metadata["typical_norms"], strict=True))
    assert directions.keys() == {"direction.1", "direction.2"}
    for layer in (1, 2):
        stored = read_tensors(made / f"extraction/tone/loud/vectors/mean_diff_layer{layer}.pt").numpy()
        found = directions[f"direction.{layer}"]
        assert np.dot(found, stored) / np.linalg.norm(found) == pytest.approx(np.linalg.norm(stored), rel=1e-6)
        assert np.linalg.norm(found) == pytest.approx(norms[layer], rel=1e-6)
    length = reader.get_field("tlcapture.length")
    assert bytes(length.parts[-1]) == b"typical norm of the residual stream"
    again = tlcapture("traits", "import", path, "--experiment", "exp", "--trait", "tone/again")
    assert "a file as tlcapture writes it: layers 1, 2, counted as resid_post" in again.output
    assert "final norm" not in again.output  # which repeng's last layer has passed


def test_control_vectors_without_a_typical_norm_have_length_1(made: Path, export: Run, data: Path) -> None:
    path = made / "extraction/tone/loud/vectors/metadata.json"
    metadata = read_json(path)
    del metadata["typical_norms"]
    path.write_text(json.dumps(metadata))
    assert export().exit_code == 0
    reader = gguf.GGUFReader(data / "out/vectors/tone/loud.probe.gguf")
    assert [float(np.linalg.norm(each.data)) for each in reader.tensors] == pytest.approx([1, 1])
    assert bytes(reader.get_field("tlcapture.length").parts[-1]) == b"unit"


def test_vectors_are_safetensors_by_component_method_and_layer(made: Path, export: Run, data: Path) -> None:
    assert export().exit_code == 0
    with safe_open(data / "out/vectors/tone/loud.safetensors", framework="pt") as file:
        assert torch.equal(
            file.get_tensor("residual/probe/1"), read_tensors(made / "extraction/tone/loud/vectors/probe_layer1.pt")
        )


def test_an_evaluation_still_recognises_its_vectors_after_import(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud")
    path = made / "extraction/tone/loud/vectors/mean_diff_layer1.pt"
    torch.save(torch.load(path), path)  # another writer: the same vector in a file of another digest
    tlcapture("evaluate", "--experiment", "exp", "--traits", "tone/loud")
    listed = tlcapture("traits", "list", "--experiment", "exp").output
    assert export().exit_code == 0
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0
    again = tlcapture("traits", "list", "--experiment", "again").output
    # The last line says what to do next, which without activations is another thing.
    assert again.replace("experiment again", "experiment exp").splitlines()[:-1] == listed.splitlines()[:-1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda out: (out / "tlcapture-export.json").unlink(), "not an export of tlcapture"),
        (lambda out: next((out / "tokens").glob("*")).write_bytes(b"PAR1"), "not a valid export"),
        (lambda out: next((out / "captures").glob("*")).unlink(), "it is incomplete"),
        (
            lambda out: (out / "vectors/tone/loud.safetensors").write_bytes(b"{}"),
            "not a valid file of exported vectors",
        ),
        (lambda out: (out / "vectors/tone/warm.safetensors").unlink(), "it has no vectors/tone/warm.safetensors"),
        (lambda out: (out / "config.json").unlink(), "it has no config.json"),
    ],
)
def test_a_damaged_export_is_one_line_and_leaves_no_experiment(
    made: Path, export: Run, tlcapture: Run, data: Path, harm: Callable[[Path], Any], said: str
) -> None:
    assert export(*EVERYTHING).exit_code == 0
    harm(data / "out")
    done = tlcapture("import", data / "out", "--experiment", "again")
    assert done.exit_code in (1, 2)
    assert said in done.output
    assert "Traceback" not in done.output
    assert [path.name for path in (data / "experiments").iterdir()] == ["exp"]


@pytest.mark.parametrize("form", FORMATS)
def test_any_changed_byte_of_an_export_is_found_and_named(
    made: Path, export: Run, tlcapture: Run, data: Path, form: str
) -> None:
    assert export("--format", form, *EVERYTHING).exit_code == 0
    card = data / "out" / "README.md"
    card.write_text("my own words")
    paths = [
        path for path in (data / "out").rglob("*") if path.is_file() and path not in (card, data / "out" / MANIFEST)
    ]
    assert {path.relative_to(data / "out").as_posix() for path in paths} == set(read_manifest(data / "out").sha256)
    for path in (max(paths, key=lambda each: each.stat().st_size), data / "out" / "config.json"):
        whole = path.read_bytes()
        at = len(whole) * 2 // 3
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        path.write_bytes(whole + b"\n" if path.name == "config.json" else changed)
        done = tlcapture("import", data / "out", "--experiment", "again")
        assert done.exit_code == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert path.name in line or "not a valid export" in line
        assert [path.name for path in (data / "experiments").iterdir()] == ["exp"]
        path.write_bytes(whole)
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0


def test_numbers_that_are_not_finite_are_refused_without_digests(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    """Exports of earlier versions have none."""
    from safetensors.torch import load_file, save_file

    assert export("--format", "safetensors", *EVERYTHING).exit_code == 0
    manifest = data / "out" / MANIFEST
    manifest.write_text(json.dumps({key: value for key, value in read_json(manifest).items() if key != "sha256"}))
    for name, key, at in (
        ("captures/short/1.safetensors", "residual_out_L1", (0, 0)),
        ("captures/short/1.safetensors", "tone/loud", (0, 0, 1)),
        ("vectors/tone/loud.safetensors", "residual/mean_diff/1", 3),
        ("vectors/tone/loud.safetensors", "training_mean/residual", (1, 3)),
    ):
        path = data / "out" / name
        whole = path.read_bytes()
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        for number in (torch.nan, torch.inf):
            tensors = load_file(path)
            tensors[key][at] = number
            save_file(tensors, path, header)
            done = tlcapture("import", data / "out", "--experiment", "again")
            assert done.exit_code == 1, (name, key)
            (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert ("NaN or infinity" in line or "finite" in line) and "doctor" not in line, line
            assert [each.name for each in (data / "experiments").iterdir()] == ["exp"]
        path.write_bytes(whole)
    assert tlcapture("import", data / "out", "--experiment", "again").exit_code == 0


def test_files_of_two_prompts_that_were_exchanged_are_named(
    made: Path, export: Run, tlcapture: Run, data: Path
) -> None:
    assert export("--format", "json").exit_code == 0
    one, two = (data / "out" / "captures" / "short" / f"{n}.json" for n in (1, 2))
    one.rename(data / "between")
    two.rename(one)
    (data / "between").rename(two)
    assert "short/1.json: damaged or changed" in tlcapture("import", data / "out", "--experiment", "again").stderr


def test_an_export_that_fails_leaves_the_earlier_one(
    made: Path, export: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export().exit_code == 0
    before = {path: path.read_bytes() for path in (data / "out").rglob("*") if path.is_file()}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlcapture.commands.export.export_vectors", full)
    assert "No space left on device" in export("--overwrite").stderr
    assert {path: path.read_bytes() for path in (data / "out").rglob("*") if path.is_file()} == before
    assert not list(data.glob(".*"))


def test_nothing_that_exists_is_replaced(made: Path, export: Run, tlcapture: Run, data: Path) -> None:
    (data / "out").mkdir()
    (data / "out" / "mine.txt").write_text("mine")
    for words in ((), ("--overwrite",)):
        done = export(*words)
        assert "something else is there" in done.output
        assert done.exit_code == 2
    shutil.rmtree(data / "out")
    assert export().exit_code == 0
    assert "an export is there already" in export().output
    assert export("--overwrite").exit_code == 0
    assert "exists already" in tlcapture("import", data / "out", "--experiment", "exp").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt-set", "shirt"), "of prompt set 'shirt': did you mean 'short'? captured sets: other, short"),
        (("--activations", "17"), "no capture of experiment 'exp' holds residual_out of layer 17"),
        (("--activations", "x"), "is not a list of layer numbers"),
        (("--points", "resid"), "is not a list of residual points"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    made: Path, export: Run, words: Any, said: str, data: Path
) -> None:
    done = export(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert not (data / "out").exists()


@pytest.mark.parametrize("kind", ["tone/loud/residual_stream/short/2.json", "raw/residual/short/2.pt"])
def test_a_damaged_capture_fails_by_name_and_the_rest_is_exported(
    made: Path, export: Run, data: Path, kind: str
) -> None:
    (made / "inference" / kind).write_text(json.dumps({"prompt": 1}))
    done = export("--format", "json")
    assert done.exit_code == 1
    assert "short/2" in done.output
    assert sorted(path.stem for path in (data / "out/captures/short").iterdir()) == ["1", "3"]
