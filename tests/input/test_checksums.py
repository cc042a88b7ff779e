"""A byte that changed in a file of numbers is noticed where they are read from it, whichever byte it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.serialization import config

from tests.input.strategies import check_refusal
from tests.input.test_capture_index import ALL, SOME, check_same, made
from tests.input.test_safetensors_files import FILES
from tlcapture.captures.capture import Capture
from tlcapture.captures.checksums import row_sums
from tlcapture.errors import StorageError
from tlcapture.explore.internals import stored_internals
from tlcapture.names import Trait
from tlcapture.storage.files import read_tensors, write_tensors
from tlcapture.storage.tensor_arrays import read_arrays
from tlcapture.traits.projections.projection import project
from tlcapture.traits.selection import Selection
from tlcapture.traits.vectors import TraitVector


def flipped(path: Path, position: int) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    other = path.with_name(f"flipped-{path.name}")
    other.write_bytes(data)
    return other


def some_positions(path: Path, n: int) -> list[int]:
    size = path.stat().st_size
    return [n_th * size // n + n_th % 7 for n_th in range(n - 1)]


def every_number(capture: Capture) -> list[torch.Tensor]:
    points = [(layer, point) for layer in capture.kept.layers for point in (*capture.kept.points, "attn_out")]
    return [capture.residual(*each) for each in points]


@pytest.mark.parametrize("kept", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_byte_of_a_capture_is_an_error_where_it_is_read_or_changes_nothing(
    tmp_path: Path, kept: Any, dtype: torch.dtype
) -> None:
    original = made(kept, dtype)
    path, n_noticed = original.save(tmp_path / "1.pt").path, 0
    for position in some_positions(path, 150):
        try:
            opened = Capture.open(flipped(path, position))
            found = every_number(opened)
        except StorageError:
            n_noticed += 1
            continue
        assert all(left.equal(right) for left, right in zip(found, every_number(original), strict=True)), position
        check_same(opened, original)
    assert n_noticed > 40


def test_a_projection_of_changed_activations_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = made().save(tmp_path / "1.pt").path
    data = path.read_bytes()
    damaged = flipped(path, data.index(made().response.residual.points[4].numpy().tobytes()) + 5)
    capture = Capture.open(damaged)
    assert capture.prompt.residual.at(2, "residual_out").equal(made().prompt.residual.at(2, "residual_out"))
    direction = torch.ones(capture.d_model)
    vector = TraitVector(Trait("tone", "loud"), "residual", "probe", 1, "exp", direction, {})
    chosen = [(vector, Selection(1, "probe", "override"))]
    with pytest.raises(StorageError, match="activations of the response do not match their checksum") as raised:
        project(capture.prompt.residual, capture.response.residual, chosen)
    assert str(raised.value).startswith(f"{damaged}: ")


@pytest.mark.parametrize("read", [read_tensors, lambda path: read_arrays(path, whole=True)])
def test_a_changed_byte_of_a_vector_or_of_internals_is_an_error_or_changes_nothing(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    value = {"blocks.1.hook_q": torch.arange(60.0).view(3, 20), "token_ids": [1, 2, 3]}
    path = write_tensors(tmp_path / "1.pt", value).path
    for position in some_positions(path, 120):
        try:
            found = read(flipped(path, position))
        except StorageError:
            continue
        assert torch.tensor(found["blocks.1.hook_q"].tolist()).equal(value["blocks.1.hook_q"]), position
        assert found["token_ids"] == [1, 2, 3]


def test_internals_that_changed_are_an_error_in_python(tmp_path: Path) -> None:
    capture, values = made(), torch.full((7, 4), 3.0)
    content = {"blocks.1.hook_q": values, "token_ids": capture.token_ids}
    path = write_tensors(tmp_path / "1_L1.pt", content).path
    assert stored_internals(path, capture, 1) is not None
    damaged = flipped(path, path.read_bytes().index(values.numpy().tobytes()) + 9)
    with pytest.raises(StorageError, match="does not match its checksum"):
        stored_internals(damaged, capture, 1)


@pytest.mark.parametrize("read", [read_tensors, lambda path: read_arrays(path, whole=True)])
def test_a_file_that_was_saved_without_checksums_is_read(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with config.patch("save.compute_crc32", False):
        torch.save({"a": torch.ones(3)}, tmp_path / "1.pt")
    assert read(tmp_path / "1.pt")["a"].sum() == 3


@pytest.mark.parametrize("shape", [(3, 5), (2, 0), (0, 4), (3, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_checksum_is_the_sum_of_the_words_of_a_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    rows = [bytes(row.contiguous().view(torch.uint8).flatten().tolist()) if row.numel() else b"" for row in tensor]
    words = [[int.from_bytes(row[start : start + 8], "little") for start in range(0, len(row), 8)] for row in rows]
    assert row_sums(tensor) == [sum(found) % 2**64 for found in words]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_of_a_compact_file_is_an_error(tmp_path: Path, name: str) -> None:
    write, read = FILES[name]
    path = tmp_path / f"{name}.safetensors"
    write(path)
    whole = read(path)
    data = bytearray(path.read_bytes())
    for position in range(0, len(data), 37):
        other = tmp_path / f"flipped-{position}" / path.name
        other.parent.mkdir()
        other.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            assert read(other) == whole, position
        except StorageError as error:
            check_refusal(error, other)
