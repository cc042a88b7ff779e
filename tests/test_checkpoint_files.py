"""Damaged files of a checkpoint are named, with what is wrong; what the config cannot mean is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tlcapture.errors import ModelError
from tlcapture.models.loading import load_model

_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_INDEX = "model.safetensors.index.json"

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sound"
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def holds(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def states(name: str, **values: Any) -> Damage:
    def write(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def in_shards(then: Damage) -> Damage:
    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: _FIRST if number % 2 else _SECOND for number, name in enumerate(sorted(weights))}
        for shard in (_FIRST, _SECOND):
            held = {name: weight for name, weight in weights.items() if places[name] == shard}
            save_file(held, folder / shard, metadata={"format": "pt"})
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        then(folder)

    return write


def without_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"[" * 40 + whole[48:])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights cut off": (cut("model.safetensors", 30_000), r"model\.safetensors: cut off: 30000 bytes, expected \d+$"),
    "weights empty": (
        cut("model.safetensors", 0),
        r"model\.safetensors: not a safetensors file, or cut off \(0 bytes\)$",
    ),
    "weights of something else": (holds("model.safetensors", b"hello" * 100), r"model\.safetensors: not a safetensors"),
    "header damaged": (without_header, r"model\.safetensors: its header is damaged$"),
    "weights not fetched": (holds("model.safetensors", _POINTER), r"model\.safetensors: a pointer of Git LFS"),
    "tokenizer not fetched": (holds("tokenizer.json", _POINTER), r"tokenizer\.json: a pointer of Git LFS"),
    "config not fetched": (holds("config.json", _POINTER), r"config\.json: a pointer of Git LFS"),
    "config cut off": (cut("config.json", 50), r"config\.json: not valid JSON: .*line 4"),
    "config a list": (holds("config.json", b"[]"), r"config\.json: expected a JSON object$"),
    "config in UTF-16": (holds("config.json", "{}".encode("utf-16")), r"config\.json: not UTF-8$"),
    "tokenizer cut off": (cut("tokenizer.json", 200), r"tokenizer\.json: not valid JSON"),
    "tokenizer config a list": (
        holds("tokenizer_config.json", b"[]"),
        r"tokenizer_config\.json: expected a JSON object$",
    ),
    "stop tokens cut off": (holds("generation_config.json", b'{"eos'), r"generation_config\.json: not valid JSON"),
    "stop token as text": (
        states("generation_config.json", eos_token_id="</s>"),
        r'eos_token_id is "</s>": expected the id',
    ),
    "stop tokens as texts": (
        states("generation_config.json", eos_token_id=[1, "2"]),
        r'is \[1, "2"\]: expected the id',
    ),
    "shard missing": (
        in_shards(lambda folder: (folder / _SECOND).unlink()),
        f"{_SECOND}: missing, but {_INDEX} names it$",
    ),
    "shard cut off": (in_shards(cut(_SECOND, 20_000)), f"{_SECOND}: cut off: 20000 bytes"),
    "index cut off": (in_shards(holds(_INDEX, b'{"weight')), r"index\.json: not valid JSON"),
    "index without files": (in_shards(holds(_INDEX, b"{}")), r"index\.json: expected weight_map"),
    "no layers": (
        states("config.json", num_hidden_layers=0),
        "has 0 layers by its config.json: expected at least one$",
    ),
    "other shapes": (
        states("config.json", intermediate_size=17),
        r"other shapes .*: model\.layers\.0\.mlp\.down_proj\.weight is \[32, 64\], expected \[32, 17\]: check",
    ),
    "unknown activation": (states("config.json", hidden_act="other"), "'other' is missing or unknown$"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_file_and_reason_in_one_line(case: str, sound: Path, tmp_path: Path) -> None:
    damage, expected = DAMAGES[case]
    folder = shutil.copytree(sound, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=expected) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_in_shards_are_loaded(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    in_shards(lambda folder: None)(folder)
    assert load_model(str(folder)).fingerprint == load_model(str(sound)).fingerprint


def test_a_context_shorter_than_the_quick_check_s_prompt_is_checked_with_fewer_tokens(
    sound: Path, tmp_path: Path
) -> None:
    for size in (1, 2, 5):
        folder = shutil.copytree(sound, tmp_path / str(size))
        states("config.json", max_position_embeddings=size)(folder)
        assert load_model(str(folder)).n_ctx == size


@pytest.mark.parametrize("stops", [None, 2, -1, [2, 5]])
def test_stop_tokens_are_ids(stops: Any, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    states("generation_config.json", eos_token_id=stops)(folder)
    with torch.no_grad():
        assert load_model(str(folder), check=False).generation_config.eos_token_id == stops
