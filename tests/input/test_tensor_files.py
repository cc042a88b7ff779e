"""Captures and vectors: valid files are read exactly, and all others are refused with a one-line error."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.utils.serialization import config

from tests.evidence import Evidence
from tests.input import captures
from tests.input.captures import N_PROMPT, WIDTH
from tests.input.strategies import ANY_JSON, Damaged, check_refusal, paths_within, replaced, try_all, without
from tlcapture.captures.capture import Capture
from tlcapture.commands.project import ProjectOptions, run_project
from tlcapture.errors import StorageError, TlcaptureError, VectorError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_tensors
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector

TRAIT = Trait("style", "odd")
POINTS = ("residual_in", "after_attn", "residual_out")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path, "exp")
    write_vector(VectorFiles(made, TRAIT), "residual", "probe", 1, torch.ones(WIDTH))
    made.residual("odd", "1").parent.mkdir(parents=True)
    return made


def is_sound(value: Any) -> bool:
    """Whether a capture obeys the rules of the format, written independently of the reader."""
    shapes, counts = set(), []
    for name in ("prompt", "response"):
        part = value[name]
        tensors = [tensor for _, by_point in sorted(part["activations"].items()) for tensor in by_point.values()]
        shapes |= {(tensor.shape[1], len(part["activations"]), tensor.dtype) for tensor in tensors} if tensors else {0}
        counts += [len(tensor) == len(part["tokens"]) == len(part["token_ids"]) for tensor in tensors]
        counts += [type(i) is int and 0 <= i < 2**31 for i in part["token_ids"]]
        counts += [type(text) is str for text in (*part["tokens"], part["text"])]
        counts += [tensor.layout == torch.strided and tensor.dtype in FLOATS for tensor in tensors]
        for layer in range(1, len(part["activations"])):
            before, after = part["activations"][layer - 1], part["activations"][layer]
            counts.append(torch.equal(before["residual_out"], after["residual_in"]))
    stated = (value["metadata"]["d_model"], value["metadata"]["n_layers"])
    return all(counts) and len({shape[2] for shape in shapes}) <= 2 and {shape[:2] for shape in shapes} == {stated}


def check_capture(layout: Layout, file: Damaged) -> None:
    """Assert that `Capture.open` and the command both refuse a file, or that its content is read correctly."""
    path = file.put(layout.residual("odd", "1"))
    try:
        capture = Capture.open(path)
    except TlcaptureError as error:
        check_refusal(error, path)
    else:
        value = torch.load(path, weights_only=True)
        assert is_sound(value)
        assert capture.token_ids == value["prompt"]["token_ids"] + value["response"]["token_ids"]
        for layer in range(capture.n_layers):
            for point in POINTS:
                own = [value[part]["activations"][layer][point] for part in ("prompt", "response")]
                assert capture.residual(layer, point).equal(torch.cat(own))
    report = run_project(layout, ["odd"], ProjectOptions())
    for failure in report.failures:
        check_refusal(failure, path)


ODD_VALUES: dict[str, Callable[[torch.Tensor], Any]] = {
    "integers": lambda t: t.long(),
    "booleans": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr() if t.ndim == 2 else t.to_sparse(),
    "without data": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "another dtype": lambda t: t.double(),
    "expanded": lambda t: torch.ones(1).expand(t.shape),
    "expanded to 10**12": lambda t: torch.ones(1).expand(*t.shape[:-1], 10**12),
    "transposed": lambda t: t.T.clone(),
    "one axis more": lambda t: t[None],
    "one axis less": lambda t: t[0],
    "a scalar": lambda t: t.sum(),
    "no numbers": lambda t: t[:0],
    "one token less": lambda t: t[:-1],
    "another width": lambda t: t[..., :-1].clone(),
    "a parameter": lambda t: torch.nn.Parameter(t),
    "a clone": lambda t: t.clone(),
    "a list": lambda t: t.tolist(),
    "other numbers": lambda t: t + 1,
}


def odd_values() -> st.SearchStrategy[Damaged]:
    good = captures.content()
    tensors = [at for at in paths_within(good) if len(at) == 4 and at[1] == "activations"]
    return st.tuples(st.sampled_from(tensors), st.sampled_from(sorted(ODD_VALUES))).map(
        lambda pair: Damaged("odd tensors", packed(replaced(good, pair[0], ODD_VALUES[pair[1]](_found(good, pair[0])))))
    )


def _found(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def odd_structure() -> st.SearchStrategy[Damaged]:
    good = captures.content()
    ways = sorted(paths_within(good), key=repr)
    odd = ANY_JSON | st.sampled_from([float("nan"), float("inf"), 10**400, -1, 2**31, True, 0.5, b"x", (), {1: 2}])
    return st.sampled_from(ways).flatmap(
        lambda at: odd.map(lambda new: Damaged("wrong types", packed(replaced(good, at, new))))
    ) | st.sampled_from([at for at in ways if at]).map(
        lambda at: Damaged("missing keys", packed(without(good, at)))
    )  # fmt: skip


def odd_bytes() -> st.SearchStrategy[Damaged]:
    whole = packed(captures.content())
    cut = st.integers(0, len(whole) - 1).map(lambda size: Damaged("truncated", whole[:size]))
    flipped = st.integers(0, 600).map(
        lambda at: Damaged("changed bytes", whole[: 60 + at] + bytes([whole[60 + at] ^ 0xFF]) + whole[61 + at :])
    )
    other = st.sampled_from([b"", b"\0" * 100, b"{}", b"PK\x03\x04", b"\x80\x02.", packed(torch.ones(3)), packed([])])
    return cut | flipped | other.map(lambda data: Damaged("no such file", data))


def test_captures_with_odd_tensors_are_refused_or_read_correctly(layout: Layout, evidence: Evidence) -> None:
    try_all(evidence, "capture", odd_values(), lambda file: check_capture(layout, file), examples=150)


def test_captures_of_another_structure_are_refused_or_read_correctly(layout: Layout, evidence: Evidence) -> None:
    try_all(evidence, "capture", odd_structure(), lambda file: check_capture(layout, file), examples=250)


def test_truncated_or_changed_captures_are_refused_or_read_correctly(layout: Layout, evidence: Evidence) -> None:
    try_all(evidence, "capture", odd_bytes(), lambda file: check_capture(layout, file), examples=120)


def test_a_tensor_longer_than_its_storage_is_refused(layout: Layout, evidence: Evidence) -> None:
    """torch maps as many values as one byte of the pickle states, even if fewer are stored."""
    with config.patch("save.compute_crc32", False):
        whole, path = packed(captures.content()), layout.residual("odd", "1")
    positions = numbers_within(packed(captures.content()))
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = 0
    for at in positions:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            Capture.open(path)
        except StorageError as error:
            seen += "do not match those of its records" in str(error)
    assert seen
    evidence.tried("capture", "size larger than stored", seen)


def numbers_within(archive: bytes) -> list[int]:
    """The offsets of the first bytes of all whole numbers that the pickle in an archive states."""
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        pickled = members.read(next(name for name in members.namelist() if name.endswith("data.pkl")))
    start = archive.index(pickled)
    return [start + (at or 0) + 1 for code, _, at in pickletools.genops(pickled) if code.name.startswith("BININT")]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0, 0), (3, 2, 5), (6, 3, 7)])
def test_captures_with_nan_or_inf_are_never_projected(
    layout: Layout, evidence: Evidence, number: float, at: tuple[int, int, int]
) -> None:
    value = captures.content()
    point, token, channel = at
    value["prompt"]["activations"][min(point // 2, 2)][POINTS[point - 2 * min(point // 2, 2)]][token, channel] = number
    path = layout.residual("odd", "1")
    torch.save(value, path)
    report = run_project(layout, ["odd"], ProjectOptions())
    assert report.n_files == 0
    check_refusal(report.failures[0], path)
    assert "NaN or inf" in report.failures[0].reason
    evidence.tried("capture", "NaN and inf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_id": "2"}, "its metadata names prompt odd/2"),
        ({"prompt_set": "other"}, "its metadata names prompt other/1"),
        ({"prompt_id": "../1"}, "not a safe file name"),
        ({"n_layers": 4}, "has 3 layers of width 8, but metadata states 4 of width 8"),
        ({"d_model": 9}, "has 3 layers of width 8, but metadata states 3 of width 9"),
        ({"model_fingerprint": torch.ones(3)}, "metadata.model_fingerprint"),
        ({"n_layers": True}, "metadata.n_layers"),
    ],
)
def test_inconsistent_metadata_is_reported(
    layout: Layout, evidence: Evidence, change: dict[str, Any], reason: str
) -> None:
    value = captures.content()
    value["metadata"] |= change
    torch.save(value, layout.residual("odd", "1"))
    (failure,) = run_project(layout, ["odd"], ProjectOptions()).failures
    assert reason in failure.reason
    assert str(layout.residual("odd", "1")) in failure.reason
    evidence.tried("capture", "inconsistent metadata")


@pytest.mark.parametrize("ids", [[-1] * N_PROMPT, [True] * N_PROMPT, [1.0] * N_PROMPT, [2**40] * N_PROMPT, [1], "1234"])
def test_invalid_token_ids_are_refused(layout: Layout, evidence: Evidence, ids: Any) -> None:
    value = captures.content()
    value["prompt"]["token_ids"] = ids
    path = layout.residual("odd", "1")
    torch.save(value, path)
    with pytest.raises(StorageError, match="prompt") as caught:
        Capture.open(path)
    check_refusal(caught.value, path)
    evidence.tried("capture", "odd token ids")


def repacked(path: Path, compression: int) -> None:
    """Rewrite the archive with its members compressed or stored."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_compressed_tensors_are_refused_because_torch_would_map_compressed_bytes(
    layout: Layout, evidence: Evidence
) -> None:
    path = layout.residual("odd", "1")
    torch.save(captures.content(), path)
    repacked(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(StorageError, match="its tensors are compressed") as caught:
        Capture.open(path)
    check_refusal(caught.value, path)
    evidence.tried("capture", "compressed")


def test_separate_tensors_are_read_like_views_of_one_buffer(layout: Layout) -> None:
    value = captures.content()
    separate = captures.content()
    for part in ("prompt", "response"):
        for by_point in separate[part]["activations"].values():
            for point, tensor in by_point.items():
                by_point[point] = tensor.clone()
    for number, each in enumerate((value, separate)):
        each["metadata"]["prompt_id"] = str(number)
        torch.save(each, layout.residual("odd", str(number)))
    one, other = (Capture.open(layout.residual("odd", str(number))) for number in (0, 1))
    assert one.prompt.residual.points.equal(other.prompt.residual.points)
    assert one.residual(1, "attn_out").equal(other.residual(1, "attn_out"))


# -- vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({*ODD_VALUES} - {"a parameter", "a clone", "other numbers", "another dtype"}))
def test_a_vector_with_an_odd_tensor_is_refused(layout: Layout, evidence: Evidence, kind: str) -> None:
    folder = VectorFiles(layout, TRAIT)
    path = folder.file("residual", "probe", 1)
    good = torch.ones(WIDTH) if kind not in ("transposed", "one axis less") else torch.ones(WIDTH, WIDTH, 2)
    torch.save(ODD_VALUES[kind](good if kind != "transposed" else good[0]), path)
    if kind in ("another width", "one token less"):
        torch.save(captures.content(), layout.residual("odd", "1"))
        (failure,) = run_project(layout, ["odd"], ProjectOptions()).failures
        assert "has width 7, but the activations have width 8" in failure.reason
    else:
        with pytest.raises(VectorError) as caught:
            read_vector(folder, "residual", "probe", 1)
        check_refusal(caught.value, path)
    evidence.tried("vector", "odd tensors")


@pytest.mark.parametrize("numbers", [[float("nan")] * 8, [float("inf")] * 8, [0.0] * 8, [1e300] * 8, [1e-320] * 8, []])
def test_a_vector_without_a_finite_direction_in_float32_is_refused(
    layout: Layout, evidence: Evidence, numbers: list[float]
) -> None:
    folder = VectorFiles(layout, TRAIT)
    path = folder.file("residual", "probe", 1)
    torch.save(torch.tensor(numbers, dtype=torch.float64), path)
    with pytest.raises(VectorError, match="zero, or holds NaN or inf") as caught:
        read_vector(folder, "residual", "probe", 1)
    check_refusal(caught.value, path)
    evidence.tried("vector", "NaN, inf, zero, huge")


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_of_any_float_dtype_and_norm_are_normalized_to_the_same_direction(
    layout: Layout, scale: float, dtype: torch.dtype
) -> None:
    torch.save(captures.content(), layout.residual("odd", "1"))
    folder = VectorFiles(layout, TRAIT)
    run_project(layout, ["odd"], ProjectOptions())
    path = layout.projection(TRAIT, "residual", "odd", "1")
    expected = path.read_text().split('"metadata"')[0]
    vector = torch.full((WIDTH,), scale, dtype=torch.float64).to(dtype)
    torch.save(torch.nn.Parameter(vector), folder.file("residual", "probe", 1))
    report = run_project(layout, ["odd"], ProjectOptions())
    usable = bool(vector.float().any()) and bool(vector.float().isfinite().all())
    assert bool(report.failures) != usable
    assert not usable or path.read_text().split('"metadata"')[0] == expected


def test_truncated_and_foreign_vectors_are_refused(layout: Layout, evidence: Evidence) -> None:
    folder = VectorFiles(layout, TRAIT)
    path = folder.file("residual", "probe", 1)
    whole = packed(torch.ones(WIDTH))
    cut = st.integers(0, len(whole) - 1).map(lambda size: Damaged("truncated", whole[:size]))
    other = st.binary(max_size=200).map(lambda data: Damaged("no such file", data))

    def check(file: Damaged) -> None:
        file.put(path)
        with pytest.raises(StorageError) as caught:
            read_vector(folder, "residual", "probe", 1)
        check_refusal(caught.value, path)

    try_all(evidence, "vector", cut | other, check, examples=150)


@pytest.mark.parametrize(
    "name", ["probe_layer03.pt", "probe_layer\u0663.pt", "probe_layer99999.pt", "pro\x1bbe_layer1.pt", "a b_layer1.pt",
             "probe_layer-1.pt", "probe_layer1.pt.pt", "_layer1.pt"]
)  # fmt: skip
def test_a_file_with_an_unexpected_name_is_not_a_vector(layout: Layout, evidence: Evidence, name: str) -> None:
    folder = VectorFiles(layout, TRAIT)
    torch.save(torch.ones(WIDTH), folder.path / name)
    assert folder.available("residual") == {"probe": [1]}
    evidence.tried("vector", "odd file names")


def test_recursive_or_huge_metadata_are_refused_quickly(layout: Layout, evidence: Evidence) -> None:
    path = layout.residual("odd", "1")
    for kind in ("itself", "one value a million times"):
        value = captures.content()
        metadata, grown = value["metadata"], ["x"]
        for _ in range(9):
            grown = [grown] * 10
        metadata["more"] = metadata if kind == "itself" else grown
        torch.save(value, path)
        try:
            assert Capture.open(path).metadata["more"]
        except StorageError as error:
            check_refusal(error, path)
        evidence.tried("capture", f"metadata that contain {kind}")


def test_layers_that_share_one_tensor_are_refused_before_they_fill_memory(layout: Layout, evidence: Evidence) -> None:
    path, value = layout.residual("odd", "1"), captures.content()
    for part in ("prompt", "response"):
        activations = value[part]["activations"]
        one = activations[0]["residual_in"].clone()
        for by_point in activations.values():
            by_point.update(dict.fromkeys(by_point, one))
    torch.save(value, path)
    with pytest.raises(StorageError, match="several share the same memory") as caught:
        Capture.open(path)
    check_refusal(caught.value, path)
    evidence.tried("capture", "layers sharing one tensor")


def test_a_torchscript_program_is_refused(tmp_path: Path, evidence: Evidence) -> None:
    path = tmp_path / "x.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(StorageError, match="TorchScript") as caught:
        read_tensors(path)
    check_refusal(caught.value, path)
    evidence.tried("capture", "programs")
