"""The index of a capture file agrees with its pickle or is absent; otherwise the file is refused."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evidence import Evidence
from tests.input.captures import N_LAYERS, N_PROMPT, N_RESPONSE, WIDTH
from tests.input.strategies import ANY_JSON, Damaged, check_refusal, damaged_json, try_all
from tlcapture.captures.capture import Capture, CapturedPart
from tlcapture.captures.capture_names import INDEX
from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.prompts.spans import TokenSpan
from tlcapture.storage.archives import Archive
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.residual import ResidualStream

ALL = KeptPoints.of(N_LAYERS)
SOME = KeptPoints(N_LAYERS, (0, 2), ("residual_in", "residual_out"))
METADATA = {
    "prompt_set": "odd",
    "prompt_id": "1",
    "n_layers": N_LAYERS,
    "d_model": WIDTH,
    "inference_model": "tiny",
    "temperature": 0.7,
    "system_prompt": "half a character: \ud83d",
}


def made(
    kept: KeptPoints = ALL,
    dtype: torch.dtype = torch.float16,
    *,
    attn_out: bool = True,
    n_response: int = N_RESPONSE,
    **more: Any,
) -> Capture:
    torch.manual_seed(0)

    def part(n_tokens: int) -> CapturedPart:
        outputs = torch.randn(len(kept.layers), n_tokens, WIDTH).to(dtype) if attn_out else None
        points = torch.randn(len(kept.point_indices), n_tokens, WIDTH).to(dtype)
        tokens = [f"t{number}\n" for number in range(n_tokens)]
        stream = ResidualStream(points, outputs, None if kept.is_all else kept)
        return CapturedPart("".join(tokens), tokens, list(range(n_tokens)), stream)

    choice = {} if kept.is_all else {"layers": list(kept.layers), "points": list(kept.points)}
    turn = TokenSpan.model_validate({"kind": "turn", "role": "user", "start": 1, "stop": N_PROMPT})
    return Capture(part(N_PROMPT), part(n_response), {**METADATA, **choice, **more}, spans=(turn,))


def append_record(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/{name}", data)


def check_same(one: Capture, other: Capture) -> None:
    assert dict(one.metadata) == dict(other.metadata) and one.spans == other.spans
    for left, right in ((one.prompt, other.prompt), (one.response, other.response)):
        assert (left.text, left.tokens, left.token_ids) == (right.text, right.tokens, right.token_ids)
        assert left.residual.kept == right.residual.kept
        assert left.residual.points.dtype == right.residual.points.dtype
        assert left.residual.points.equal(right.residual.points)
        assert (left.residual.attn_out is None) == (right.residual.attn_out is None)
        if left.residual.attn_out is not None and right.residual.attn_out is not None:
            assert left.residual.attn_out.equal(right.residual.attn_out)


def has_index(path: Path) -> bool:
    return INDEX in Archive(path)


def saved_again(path: Path) -> Path:
    """A copy of a capture file that was loaded and saved with torch, which drops the index."""
    again = path.with_name(f"again-{path.name}")
    torch.save(torch.load(path, weights_only=True, mmap=True), again)
    return again


@pytest.mark.parametrize("attn_out", [True, False])
@pytest.mark.parametrize("kept", [ALL, SOME])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_response", [N_PROMPT, N_RESPONSE, 0])  # storages of equal size and empty ones too
def test_a_capture_opens_the_same_with_and_without_its_index(
    tmp_path: Path, kept: KeptPoints, dtype: torch.dtype, attn_out: bool, n_response: int
) -> None:
    capture = made(kept, dtype, attn_out=attn_out, n_response=n_response)
    written = capture.save(tmp_path / "1.pt")
    path = written.path
    assert path.stat().st_size == written.size
    again = saved_again(path)
    assert has_index(path)
    assert not has_index(again)
    check_same(Capture.open(path), capture)
    check_same(Capture.open(again), capture)


def test_equal_captures_have_identical_files(tmp_path: Path) -> None:
    for name in ("1.pt", "2.pt"):
        made().save(tmp_path / name)
    assert (tmp_path / "1.pt").read_bytes() == (tmp_path / "2.pt").read_bytes()


def test_changing_an_opened_capture_does_not_change_its_file(tmp_path: Path) -> None:
    path = made().save(tmp_path / "1.pt").path
    Capture.open(path).prompt.residual.points.zero_()
    check_same(Capture.open(path), made())


@pytest.mark.parametrize("more", [{"odd": (1, 2)}, {"odd": {1: 2}}, {"odd": b"x"}, {"odd": {(1, 2): 3}}])
def test_a_capture_that_json_cannot_represent_has_no_index(tmp_path: Path, more: dict[str, Any]) -> None:
    path = made(**more).save(tmp_path / "1.pt").path
    assert not has_index(path)
    check_same(Capture.open(path), made(**more))


def test_parts_that_share_a_storage_share_its_record(tmp_path: Path) -> None:
    whole = made(attn_out=False, n_response=N_PROMPT)
    capture = replace(whole, response=replace(whole.prompt, text="the same again"))
    path = capture.save(tmp_path / "1.pt").path
    assert {index_of(path)[part]["points"]["record"] for part in ("prompt", "response")} == {"data/0"}
    check_same(Capture.open(path), capture)


def test_no_index_is_written_for_activations_that_are_part_of_a_storage(tmp_path: Path) -> None:
    whole = made(attn_out=False)
    points = torch.cat([whole.prompt.residual.points, whole.prompt.residual.points])
    part = replace(whole.prompt, residual=replace(whole.prompt.residual, points=points[: len(points) // 2]))
    path = replace(whole, prompt=part).save(tmp_path / "1.pt").path
    assert not has_index(path)
    check_same(Capture.open(path), whole)


def test_a_file_is_not_read_to_make_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(Archive, "__init__", lambda self, path: opened.append(path))
    made().save(tmp_path / "1.pt")
    assert not opened


def index_of(path: Path) -> Any:
    return json.loads(Archive(path).read(INDEX))


def with_index(path: Path, data: bytes) -> Path:
    again = saved_again(path)
    append_record(again, INDEX, data)
    return again


def test_damaged_indexes_are_refused_or_read_correctly(tmp_path: Path, evidence: Evidence) -> None:
    """A capture that opens has activations for each token, all of them from the file."""
    path = made(system_prompt=None).save(tmp_path / "1.pt").path
    bare = saved_again(path).read_bytes()

    def check(file: Damaged) -> None:
        odd = tmp_path / "odd.pt"
        odd.write_bytes(bare)
        append_record(odd, INDEX, file.data)
        try:
            found = Capture.open(odd)
        except TlcaptureError as error:
            check_refusal(error, odd)
            return
        assert found.n_layers == N_LAYERS
        for part, n_tokens in ((found.prompt, N_PROMPT), (found.response, N_RESPONSE)):
            assert len(part.tokens) == len(part.token_ids) == part.residual.n_tokens == n_tokens
            assert part.residual.points.shape == (len(found.kept.point_indices), n_tokens, WIDTH)

    try_all(evidence, "index of a capture", damaged_json(index_of(path)) | any_json(), check, examples=400)


def any_json() -> Any:
    return ANY_JSON.map(lambda value: Damaged("another value", json.dumps(value).encode()))


@pytest.mark.parametrize(
    ("part", "name", "change", "reason"),
    [
        ("prompt", "points", {"record": "data/9"}, "no record data/9"),
        ("prompt", "points", {"record": "data/1"}, "its record data/1 has"),
        ("response", "attn_out", {"dtype": "float32"}, "expected [3, 5, 8] of 4 each"),
        ("response", "attn_out", {"dtype": "int64"}, "response.attn_out.dtype"),
        ("prompt", "points", {"shape": [7, N_PROMPT + 1, WIDTH]}, "prompt: [7, 5, 8], expected [7, 4, 8]"),
        ("prompt", "points", {"shape": [7, N_PROMPT, -WIDTH]}, "prompt.points.shape[2]"),
        ("prompt", "points", {"row_sums": [0] * 6}, "6 row_sums, expected 7"),
    ],
)
def test_an_index_of_another_file_is_refused(
    tmp_path: Path, part: str, name: str, change: dict[str, Any], reason: str
) -> None:
    path = made().save(tmp_path / "1.pt").path
    index = index_of(path)
    index[part][name] |= change
    odd = with_index(path, json.dumps(index).encode())
    with pytest.raises(StorageError) as caught:
        Capture.open(odd)
    assert reason in str(caught.value)
    check_refusal(caught.value, odd)


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    path = made().save(tmp_path / "1.pt").path
    odd = with_index(path, json.dumps({**index_of(path), "format_version": 2}).encode())
    with pytest.raises(StorageError, match="format version 2, this tlcapture reads 1"):
        Capture.open(odd)


def test_damage_to_an_index_or_to_its_records_is_refused(tmp_path: Path, evidence: Evidence) -> None:
    path = made().save(tmp_path / "1.pt").path
    whole = path.read_bytes()
    at = whole.index(b'"inference_model"')
    path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    with pytest.raises(StorageError, match=f"record {INDEX} is damaged") as caught:
        Capture.open(path)
    check_refusal(caught.value, path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("archive/data/0").header_offset
    path.write_bytes(whole[:start] + b"XX" + whole[start + 2 :])
    with pytest.raises(StorageError, match="record data/0 is not where it should be") as caught:
        Capture.open(path)
    check_refusal(caught.value, path)
    evidence.tried("index of a capture", "changed bytes", 2)


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = made().save(tmp_path / "1.pt").path
    with pytest.warns(UserWarning, match="Duplicate name"):
        append_record(path, INDEX, b"{}")
    with pytest.raises(StorageError, match="two records with the same name"):
        Capture.open(path)


@pytest.mark.parametrize("by_index", [True, False])
def test_an_open_capture_holds_no_file_open(tmp_path: Path, by_index: bool) -> None:
    path = made().save(tmp_path / "1.pt").path
    path = path if by_index else saved_again(path)
    before = len(os.listdir("/dev/fd"))
    captures = [Capture.open(path) for _ in range(20)]
    assert len(os.listdir("/dev/fd")) <= before + 1
    assert all(capture.prompt.residual.points.equal(made().prompt.residual.points) for capture in captures)


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captures with texts of equal length are neither confused nor mixed."""
    path, other = (made(dtype=torch.float16).save(tmp_path / name).path for name in ("1.pt", "2.pt"))
    tensors = Archive.tensors

    def replacing(self: Archive, *args: Any) -> Any:
        if other.exists():
            other.replace(path)
        return tensors(self, *args)

    monkeypatch.setattr(Archive, "tensors", replacing)
    with pytest.raises(StorageError, match="the file was replaced while it was being opened"):
        Capture.open(path)
    check_same(Capture.open(path), made())


def test_an_index_without_the_attention_outputs_of_one_part_is_refused(tmp_path: Path) -> None:
    path = made().save(tmp_path / "1.pt").path
    index = index_of(path)
    index["response"]["attn_out"] = None
    odd = with_index(path, json.dumps(index).encode())
    with pytest.raises(StorageError, match="prompt and response hold different activations") as caught:
        Capture.open(odd)
    check_refusal(caught.value, odd)


def test_an_index_without_checksums_is_read(tmp_path: Path) -> None:
    path = made().save(tmp_path / "1.pt").path
    index = index_of(path)
    for part in ("prompt", "response"):
        for name in ("points", "attn_out"):
            del index[part][name]["row_sums"]
    check_same(Capture.open(with_index(path, json.dumps(index).encode())), made())
