"""Compact files: what safetensors itself reads is read alike, and hostile or damaged ones are named in one line."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.input.strategies import check_refusal
from tlcapture.errors import StorageError
from tlcapture.page.contents import Contents
from tlcapture.storage.compact.compact_files import is_written_compact, open_compact
from tlcapture.storage.compact.projection_shards import Shard, readable_shards, sharded_texts, single_shards
from tlcapture.storage.compact.safetensors_files import CHECKSUM, TensorFile, TensorSpec, write_safetensors
from tlcapture.storage.compact.shard_writing import merge_shards, take_out, write_prompt
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.saved_attention import read_attention, write_attention
from tlcapture.views.saved_lens import read_lens, write_lens

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5, 2.5], np.float16),
    "c": np.zeros((0, 5), np.int32),
    "d": np.array([2**40, -1], np.int64),
}
DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64"}


def packed(head: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_files_of_safetensors_and_ours_are_the_same(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(ARRAYS, theirs, {"x": "y"})
    specs = {name: TensorSpec(DTYPES[str(array.dtype)], array.shape) for name, array in ARRAYS.items()}
    pieces = {name: [array[:1], array[1:]] for name, array in ARRAYS.items()}
    write_safetensors(ours, specs, {"x": "y"}, pieces)
    for path in (theirs, ours):
        found, file = load_file(path), TensorFile.open(path)
        assert file.metadata["x"] == "y"
        for name, array in ARRAYS.items():
            assert np.array_equal(found[name], array)
            assert np.array_equal(file.array(name), array)
            assert file.array(name).dtype == array.dtype


def test_pieces_of_another_size_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="its shape"):
        write_safetensors(path, {"a": TensorSpec("F32", (3,))}, {}, {"a": [np.zeros(2, np.float32)]})
    assert not list(tmp_path.iterdir())


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "an endless header": packed({}, length=2**63),
    "a header beyond the file": packed({}, length=1000),
    "a header of one byte": packed(b"{", length=1),
    "no JSON": packed(b"{nope}"),
    "deep nesting": packed(b'{"a":' + b"[" * 10**6),
    "a list": packed([]),
    "numbers as metadata": packed({"__metadata__": {"a": 1}}),
    "no dtype": packed({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "an unknown dtype": packed({"a": {**F32, "dtype": "F999"}}, bytes(8)),
    "a list as dtype": packed({"a": {**F32, "dtype": []}}, bytes(8)),
    "a negative size": packed({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "a size that is a text": packed({"a": {**F32, "shape": "2"}}, bytes(8)),
    "a huge size": packed({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(8)),
    "zero times huge": packed({"a": {**F32, "shape": [2**62, 2]}, "b": {**F32, "shape": [0, 2**62]}}, bytes(8)),
    "a true size": packed({"a": {**F32, "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    "overlapping tensors": packed({"a": F32, "b": F32}, bytes(8)),
    "a hole": packed({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)),
    "offsets backwards": packed({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "bytes left over": packed({"a": F32}, bytes(9)),
    "cut off": packed({"a": F32}, bytes(7)),
    "empty": b"",
    "seven bytes": b"1234567",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "1_attention.safetensors"
    path.write_bytes(HOSTILE[kind])
    tracemalloc.start()
    try:
        for read in (TensorFile.open, read_attention, read_lens, Shard.open):
            with pytest.raises(StorageError) as refused:
                read(path)
            check_refusal(refused.value, path)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def attention_file(path: Path) -> None:
    head = {"n_layers": 2, "n_heads": 2, "tokens": ["a", "b", "c"], "n_prompt_tokens": 1}
    weights = np.full((6, 2), 0.25, np.float32)
    write_attention(path, head, Positions.of(None, 1, 3), [0, 1], lambda layer: [weights])


def lens_file(path: Path) -> None:
    head = {"n_layers": 2, "top_k": 2, "tokens": ["a", "b", "c"], "n_prompt_tokens": 1}
    ids = np.array([[[5, 7], [7, 5]], [[5, 5], [7, 7]]])
    write_lens(
        path, head, ids, np.full(ids.shape, 0.5, np.float32), ids[..., 0], np.full((2, 2), 0.5, np.float32), _texts
    )


def _texts(ids: Any) -> list[str]:
    return [f"t{number}" for number in ids]


def shard_file(path: Path, trait: str = "tone/loud") -> None:
    part = {"text": "ab", "tokens": ["a", "b"], "n_tokens": 2}
    scores = [[[1.0, 2.0], [3.0, 4.0]]] * 2
    source = {"trait": trait, "method": "probe", "layer": 1, "component": "residual"}
    content = {
        "prompt": part,
        "response": part,
        "projections": {"prompt": scores, "response": scores},
        "dynamics": {"commitment_point": None, "persistence": None, "velocity": [0.0] * 3, "acceleration": [0.0] * 2},
        "metadata": {"vector_source": source, "layers": [0, 1], "sublayers": ["after_attn", "residual_out"]},
    }
    write_prompt(path.parent, path.stem, {trait: content})


def read_all_of_attention(path: Path) -> Any:
    saved = read_attention(path)
    entries = [saved.entry(token).model_dump() for token in saved.token_indices]
    return entries, [saved.heads(layer).tolist() for layer in saved.head.kept_layers]


def read_all_of_lens(path: Path) -> Any:
    saved = read_lens(path)
    entries = [saved.entry(token).model_dump() for token in saved.token_indices]
    return entries, [each.model_dump() for each in saved.overview()], repr(saved.numbers())


def read_all_of_shard(path: Path) -> Any:
    shard = Shard.open(path)
    return [each.content() for entry in shard.index.prompts for each in shard.sharded(entry.id)]


FILES = {
    "1_attention": (attention_file, read_all_of_attention),
    "1_logit_lens": (lens_file, read_all_of_lens),
    "1": (shard_file, read_all_of_shard),
}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_named_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    write, read = FILES[name]
    path = tmp_path_factory.mktemp("damaged") / f"{name}.safetensors"
    write(path)
    read(path)
    whole = bytearray(path.read_bytes().replace(CHECKSUM.encode(), b"other"))  # which would notice all damage
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    try:
        read(path)
    except StorageError as error:
        check_refusal(error, path)


def test_weights_and_probabilities_beyond_their_range_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "1_attention.safetensors"
    head = {"n_layers": 1, "n_heads": 1, "tokens": ["a"], "n_prompt_tokens": 1}
    write_attention(path, head, Positions.of(None, 1, 1), [0], lambda layer: [np.full((1, 1), 2, np.float32)])
    with pytest.raises(StorageError, match="not between 0 and 1"):
        read_attention(path).heads(0)


def test_2000_tokens_take_2_bytes_a_weight_and_open_at_once(tmp_path: Path) -> None:
    """As many as make JSON of 240 MB; what the page asks for first is the head and one token."""
    n_tokens, n_heads, layers = 2000, 4, [0, 1, 2]
    path = tmp_path / "experiments" / "exp" / "analysis" / "per_token" / "odd" / "1_attention.safetensors"
    head = {"n_layers": 3, "n_heads": n_heads, "tokens": ["some"] * n_tokens, "n_prompt_tokens": 10}
    rows = [np.full((query + 1, n_heads), 1 / (query + 1), np.float32) for query in range(n_tokens)]
    chunks = [np.concatenate(rows[start : start + 256]) for start in range(0, n_tokens, 256)]
    write_attention(path, head, Positions.of(None, 10, n_tokens), layers, lambda layer: chunks)
    n_weights = len(layers) * n_heads * n_tokens * (n_tokens + 1) // 2
    assert path.stat().st_size <= 2.2 * n_weights
    began = time.perf_counter()
    contents = Contents(tmp_path)
    contents.attention("exp", "odd", "1")
    entry = contents.attention_token("exp", "odd", "1", str(n_tokens - 1))
    assert time.perf_counter() - began < 1
    assert entry["by_layer"][2][3] == pytest.approx([0.0005] * n_tokens, rel=1e-3)


def test_an_opened_file_holds_no_descriptor_and_notices_that_it_was_replaced(tmp_path: Path) -> None:
    """Thousands of shards may be known at one time."""
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened = [TensorFile.open(path) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert np.array_equal(opened[0].array("a"), ARRAYS["a"])
    path.unlink()
    save_file(ARRAYS, path)
    with pytest.raises(StorageError, match="was replaced while it was being read"):
        opened[0].array("a")


HEAD = {"kind": "attention", "version": "1", "numbers": "", "content": '{"tokens": []}'}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (
            {**HEAD, "kind": "logit lens"},
            "expected a safetensors file of the kind 'attention', but it states 'logit lens'",
        ),
        (None, "expected a safetensors file of the kind 'attention', but it states none"),
        ({**HEAD, "version": "2"}, "its version is '2', expected '1': a newer tlcapture reads it"),
        ({**HEAD, "content": "{"}, "content: not JSON: "),
        ({**HEAD, "content": "[]"}, "content: expected a JSON object"),
    ],
)
def test_a_compact_file_of_another_kind_or_version_is_refused(
    metadata: dict[str, str] | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "1_attention.safetensors"
    save_file({"layer.1": np.ones((1, 1), np.float16)}, path, metadata=metadata)
    with pytest.raises(StorageError) as caught:
        open_compact(path, "attention")
    assert str(caught.value).startswith(f"{path}: not a valid attention file: {said}")


def test_what_json_would_hold_in_64_mb_is_json() -> None:
    assert [is_written_compact(None, 64 * 2**20 + beyond) for beyond in (0, 1)] == [False, True]
    assert [is_written_compact(form, size) for form in ("json", "compact") for size in (0, 1e12)] == [
        False, False, True, True,
    ]  # fmt: skip


def test_many_shards_are_read_with_few_files_open(tmp_path: Path) -> None:
    shard_file(tmp_path / "0.safetensors")
    for number in range(1, 100):
        content = (tmp_path / "0.safetensors").read_bytes()
        (tmp_path / f"{number}.safetensors").write_bytes(content.replace(CHECKSUM.encode(), b"other"))
    before = len(os.listdir("/proc/self/fd"))
    assert sharded_texts(tmp_path) == {"0": "ab"}
    shards = list(readable_shards(single_shards(tmp_path)))
    assert len([shard.content("0", "tone/loud") for shard in shards]) == 100
    assert len(os.listdir("/proc/self/fd")) <= before + 64


def test_a_shard_of_changed_numbers_is_neither_merged_nor_divided(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        shard_file(tmp_path / f"{name}.safetensors")
    damaged = tmp_path / "c.safetensors"
    changed = damaged.read_bytes().replace(np.float32(4).tobytes(), np.float32(5).tobytes())
    damaged.write_bytes(changed)
    (merged,) = merge_shards(tmp_path)
    assert [entry.id for entry in Shard.open(merged.path).index.prompts] == ["a", "b", "d"]
    assert damaged.read_bytes() == changed
    changed = merged.path.read_bytes().replace(np.float32(4).tobytes(), np.float32(5).tobytes())
    merged.path.write_bytes(changed)
    assert take_out(tmp_path, "a") == []
    assert merged.path.read_bytes() == changed
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["c"]
