"""Tensors as arrays without torch: what `torch.load` reads, and nothing that runs anything or reaches too far."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import StorageError
from tlcapture.storage.files import write_tensors
from tlcapture.storage.tensor_arrays import read_arrays

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)


def content() -> dict[str, Any]:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) / 1 for dtype in DTYPES[:4]}
    return {
        **tensors,
        "ids": torch.tensor([3, 1, 2]),
        "whole": whole,
        "view": whole[1:3, ::2],
        "turned": whole.T,
        "repeated": torch.ones(1).expand(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "plain": {"text": "a", 3: [1, None, True, 2.5]},
    }


@pytest.mark.parametrize("save", [write_tensors, lambda path, value: torch.save(value, path)])
def test_arrays_equal_the_tensors_that_torch_loads(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.pt"
    save(path, content())
    found, expected = read_arrays(path), torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        if isinstance(each, torch.Tensor):
            wanted = each.float().numpy() if each.dtype == torch.bfloat16 else each.numpy()
            assert found[name].dtype == wanted.dtype
            np.testing.assert_array_equal(found[name], wanted)
        else:
            assert found[name] == each


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.pt", content())
    code = (
        "import sys; from pathlib import Path; from tlcapture.storage.tensor_arrays import read_arrays; "
        "print(float(read_arrays(Path(sys.argv[1]))['whole'].sum()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.pt"], capture_output=True, text=True)
    assert done.stdout.split() == ["276.0", "False"], done.stderr


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("value", [_Runs(), torch.nn.Linear(2, 2), torch.ones(2).to_sparse(), torch.device("cpu")])
def test_other_objects_are_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": value}, tmp_path / "a.pt")
    with pytest.raises(StorageError, match=r"a\.pt: cannot be read as a tensor file: .*more than tensors"):
        read_arrays(tmp_path / "a.pt")
    assert not Path("ran").exists()


def rewritten(path: Path, change: Any) -> None:
    """The archive with another pickle: that of its content after `change` of the arguments of every tensor."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(each for each in records if each.endswith("data.pkl"))

    records[name] = change(records[name])
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in records.items():
            archive.writestr(each, data)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(6).reshape(2, 3)}, path)
    rewritten(path, lambda data: data.replace(b"K\x02K\x03\x86", b"K\x63K\x03\x86"))  # 99 rows in place of 2
    with pytest.raises(StorageError, match="reaches beyond its storage"):
        read_arrays(path)


@given(cut=st.floats(0, 1), flip=st.integers(0, 10_000))
def test_a_damaged_file_is_an_error_of_one_line_or_read_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, cut: float, flip: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    write_tensors(path, content())
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 0x55
    path.write_bytes(data[: int(len(data) * cut)] if flip % 2 else data)
    said = ""
    try:
        read_arrays(path)
    except StorageError as error:
        said = str(error)
    assert "\n" not in said


def test_what_is_not_there_or_no_archive_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not an archive")
    for name, expected in (("none.pt", "no such file"), ("text.pt", "not a zip archive")):
        with pytest.raises(StorageError, match=f"{name}: .*{expected}"):
            read_arrays(tmp_path / name)
