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


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def in_torch(value: Any = None, size: int | None = None, *, content: bytes | None = None) -> Damage:
    """The weights, or a value, by `torch.save` instead, and of that only the first bytes."""

    def write(folder: Path) -> None:
        path = folder / "pytorch_model.bin"
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights if value is None else value, path)
        path.write_bytes(path.read_bytes()[:size] if content is None else content)

    return write


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
    "template in Latin-1": (holds("chat_template.jinja", b"{# \xe9 #}"), r"chat_template\.jinja: not UTF-8$"),
    "template without a name": (
        lambda folder: (
            (folder / "chat_template.jinja").unlink(missing_ok=True),
            states("tokenizer_config.json", chat_template=[{"template": "x"}])(folder),
        ),
        r'chat_template: expected a text, or a list of \{"name", "template"\}$',
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
    "torch file cut off": (in_torch(size=20_000), r"_model\.bin: damaged or cut off \(20000 bytes\): fetch it again$"),
    "torch file empty": (in_torch(size=0), r"pytorch_model\.bin: damaged or cut off \(0 bytes\): fetch it again$"),
    "torch file of zeros": (in_torch(content=b"PK" + bytes(90)), r"pytorch_model\.bin: damaged or cut off"),
    "torch file of something else": (in_torch(content=b"hello" * 100), r"pytorch_model\.bin: damaged or cut off"),
    "torch file with code": (in_torch({"a": Code()}), r"more than tensors, and is not opened for safety: use weights"),
    "torch file of a list": (in_torch([1, 2]), r"_model\.bin: not a file of weights: expected weights by name$"),
    "torch file not fetched": (in_torch(content=_POINTER), r"pytorch_model\.bin: a pointer of Git LFS"),
    "no layers": (
        states("config.json", num_hidden_layers=0),
        "has 0 layers by its config.json: expected at least one$",
    ),
    "no positions": (
        states("config.json", max_position_embeddings=-1),
        "has -1 positions by its config.json: expected at least one$",
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


_TAKEN = "model.layers.1.mlp.up_proj.weight"


def with_type(dtype: torch.dtype, name: str = _TAKEN, then: Damage = lambda folder: None) -> Damage:
    """A weight in another type, as rounding without a scale makes it."""

    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name] = (weights[name] * 50).to(dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        then(folder)

    return write


_TYPES = {
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "form"),
    [
        *((kind, _TAKEN, "safetensors") for kind in _TYPES),
        *(("I8", name, "safetensors") for name in ("model.embed_tokens.weight", "model.norm.weight")),
        *((kind, _TAKEN, form) for kind in ("I8", "F8_E4M3") for form in ("shards", "torch")),
    ],
)
def test_weights_of_a_quantised_type_need_a_quantisation(
    kind: str, name: str, form: str, sound: Path, tmp_path: Path
) -> None:
    """transformers casts them to floating point, without their scales."""
    folder = shutil.copytree(sound, tmp_path / "model")
    then = {"shards": in_shards(lambda folder: None), "torch": in_torch()}.get(form, lambda folder: None)
    with_type(_TYPES[kind], name, then)(folder)
    with pytest.raises(
        ModelError, match=rf"only quantised checkpoints have \({name} is (torch\.)?\w+\): expected a qu"
    ):
        load_model(str(folder))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["one file", "shards", "torch"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(
    form: str, number: float, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the sound checkpoint has passed the check before: their fingerprints may be the same."""
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(sound, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[_TAKEN][3, 5] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    {"one file": lambda folder: None, "shards": in_shards(lambda folder: None), "torch": in_torch()}[form](folder)
    (path,) = [path for path in folder.glob("*model*") if path.suffix in (".safetensors", ".bin") and held(path)]
    with pytest.raises(ModelError, match=rf"{path}: {_TAKEN} holds NaN or infinity: expected finite weights$"):
        load_model(str(folder))


def held(path: Path) -> bool:
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    return _TAKEN in weights


def test_activations_beyond_the_range_of_a_dtype_are_no_fault_of_the_weights(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLCAPTURE_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(sound, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3e38 / weights["model.embed_tokens.weight"].abs().max()
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder)).n_layers == tiny.N_LAYERS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_several_floating_types_are_loaded(dtype: torch.dtype, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    with_type(dtype, then=in_torch() if dtype == torch.float16 else lambda folder: None)(folder)
    assert load_model(str(folder)).dtype == torch.float32


def test_whole_numbers_that_no_module_takes_are_loaded(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights |= {"model.position_ids": torch.arange(5), "model.layers.0.attn.bias": torch.ones(4, 4, dtype=torch.uint8)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder)).fingerprint == load_model(str(sound)).fingerprint


def test_weights_in_shards_are_loaded(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    in_shards(lambda folder: None)(folder)
    assert load_model(str(folder)).fingerprint == load_model(str(sound)).fingerprint


def test_an_implementation_of_attention_that_the_config_asks_for_is_not_needed(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    states("config.json", _attn_implementation="flash_attention_2")(folder)
    assert load_model(str(folder)).fingerprint == load_model(str(sound)).fingerprint


def test_outputs_that_the_config_asks_for_are_left_out(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    states("config.json", return_dict=False, output_attentions=True, output_router_logits=True)(folder)
    assert load_model(str(folder), engine="bridge").hf_config.return_dict


@pytest.mark.parametrize(("dtype", "n_notes"), [("bfloat16", 1), ("float32", 0), (None, 0)])
def test_weights_that_the_config_has_rounded_are_said_to_be(
    dtype: str | None, n_notes: int, sound: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    states("config.json", dtype=dtype)(folder)
    notes: list[str] = []
    load_model(str(folder), check=False, warn=notes.append)
    assert len(notes) == n_notes
    assert all("weights in 32 bits that are rounded to bfloat16" in note for note in notes)


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
