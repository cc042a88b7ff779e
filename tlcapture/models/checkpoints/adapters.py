"""LoRA and other PEFT adapters: finding the model that an adapter is for, and merging the adapter into its weights.

An adapter is a folder with `adapter_config.json`. Full weights in the same folder are the weights
that it adapts; without them, the adapter's config names them. peft is imported only to merge.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints.files import PLAIN_TYPES, damage
from tlcapture.models.checkpoints.finite_weights import not_finite, not_finite_message
from tlcapture.models.checkpoints.untaken import listed
from tlcapture.text import decoded

CONFIG = "adapter_config.json"
# Subfolders that workers of a cluster receive: the adapter in its model's folder, or the model in its adapter's.
GIVEN = "adapter"
BASE = "base"
# Options of `from_pretrained` with which transformers does not find an adapter, to inject it without merging.
NOT_BY_TRANSFORMERS = {"adapter_kwargs": {"subfolder": "merged-by-tlcapture"}}
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
_OWN_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LORA = "lora_"  # in the names of weights that are added
_TOKENS = ".trainable_tokens_delta"  # at the end of the names of tokens that are trained alone
# Ways to initialise LoRA that take something random, or a gradient, out of the weights that are adapted.
_CHANGED_BY = ("pissa_niter_", "lora_ga")
_IN_A_LAYER = re.compile(r"\.\d+\.")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Adapter:
    """The folder of an adapter, and the model that it adapts: a folder or a name on the hub.

    `base` equals `source` where full weights are beside the adapter.
    """

    source: str
    base: str

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer is: beside the adapter if it has one."""
        folder = Path(self.source)
        has_one = any((folder / name).is_file() for name in _TOKENIZERS)
        return self.source if has_one else self.base


def adapter_of(source: str) -> Adapter | None:
    """The adapter in a folder; `None` if it has none.

    Raises `ModelError` if its config is not valid, or names no model.
    """
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        return None
    if (folder / "config.json").is_file() and any(map(any, map(folder.glob, _WEIGHTS))):
        return Adapter(source, source)
    base, revision = _named_base(folder / CONFIG)
    for path in (folder / BASE, folder / base, Path(base)):
        if any((path / file).is_file() for file in ("config.json", CONFIG)):
            return Adapter(source, str(path))
    if Path(base).is_absolute() or base.startswith("."):
        raise ModelError(f"{source}: an adapter for the model {base}, which does not exist")
    return Adapter(source, f"{base}@{revision}" if revision else base)


def given_adapter(folder: str, base: str) -> Adapter:
    """The adapter in a folder, for a model that is named beside it, whatever model its config names.

    Raises `ModelError` for a folder that does not hold an adapter.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelError(f"adapter {folder!r}: no such folder: expected one with {CONFIG}, as peft saves it")
    if not (path / CONFIG).is_file():
        raise ModelError(f"adapter {folder!r}: not an adapter: the folder has no {CONFIG}, with which peft saves one")
    if not _config_of(path / CONFIG).get("peft_type"):
        raise ModelError(f"{path / CONFIG}: expected the config of a PEFT adapter, with its peft_type")
    return Adapter(str(path), base)


def digest_of(adapter: Adapter) -> str:
    """16 hex digits that identify an adapter: a hash of its config and weights."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(adapter.source).glob("adapter_*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_within_layers(adapter: Adapter) -> bool:
    """Whether an adapter changes numbered layers only: not embedding, final norm or unembedding."""
    from safetensors import safe_open

    path = Path(adapter.source) / "adapter_model.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as opened:
        return all(_IN_A_LAYER.search(name) for name in opened.keys())  # noqa: SIM118  not a mapping


def adapter_folder(adapter: str, source: Path | None) -> str:
    """Where the files of an adapter are: its own folder, or `GIVEN` in the model's where they were sent with it."""
    sent = None if source is None else source / GIVEN
    return str(sent) if sent is not None and sent.is_dir() and not Path(adapter).expanduser().is_dir() else adapter


def other_base(adapter: Adapter) -> str | None:
    """The model that an adapter's config names, if that seems to differ from the one it is applied to."""
    named = _config_of(Path(adapter.source) / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    is_same = Path(named).expanduser().resolve() == Path(adapter.base).expanduser().resolve()
    return None if is_same or _last(named) == _last(adapter.base) else named


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def _named_base(path: Path) -> tuple[str, str | None]:
    """The name of the model that an adapter's config states, and its revision if it states one."""
    config = _config_of(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path}: expected a PEFT adapter whose base_model_name_or_path names the model that it is for: "
            "add that name, or give the model with --model and the adapter with --adapter"
        )
    return base, revision if isinstance(revision, str) else None


def _config_of(path: Path) -> dict[str, Any]:
    """An adapter's config; empty if it is not one."""
    try:
        config = json.loads(decoded(path.read_bytes()))
    except (OSError, ValueError):
        config = None
    return config if isinstance(config, dict) else {}


def merged(model: Any, adapter: Adapter, name: str) -> Any:
    """The Hugging Face model with an adapter merged into its weights, in their dtype.

    Raises `ModelError` if peft is not installed, the adapter cannot be merged, or its weights do not fit the model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"model {name!r} has a PEFT adapter, which needs the package peft to be merged: "
            "run 'pip install peft', or move adapter_config.json away to use the weights without it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _merged(model, adapter, name)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # peft raises many kinds for adapters that do not fit
        reason = _fault(Path(adapter.source)) or " ".join(str(error).split())
        raise ModelError(f"model {name!r}: its adapter cannot be merged: {reason[:300]}") from None


def _fault(folder: Path) -> str | None:
    """What is wrong with the files of an adapter's folder; `None` if nothing is known to be."""
    if not any((folder / name).exists() for name in _OWN_WEIGHTS):
        return f"{folder / _OWN_WEIGHTS[0]}: no such file"
    return damage(folder)


def _merged(model: Any, adapter: Adapter, name: str) -> Any:
    import peft

    _check_kind(peft.PeftConfig.from_pretrained(adapter.source), name)
    weights = peft.load_peft_weights(adapter.source, device="cpu")
    _check_numbers(weights, adapter, name)
    _resize(model, weights, name)
    device = str(model.device)
    adapted = peft.PeftModel.from_pretrained(model, adapter.source, torch_device=device)
    found = adapted.load_adapter(adapter.source, "default", torch_device=device)
    # peft writes the modules of a model whose vocabulary was extended twice.
    extra = {key for key in found.unexpected_keys if key.replace(".modules_to_save.", ".") not in {*weights} - {key}}
    # Of a tied embedding, peft writes the trained tokens twice as well.
    extra -= {key for key in extra if key.endswith(_TOKENS) and _is_repeated(key, weights)}
    wrong = sorted({*found.missing_keys, *extra})
    if wrong:
        raise ModelError(f"model {name!r}: its adapter does not fit {adapter.base!r}: {listed(wrong)}")
    if twice := _adapted_twice(adapted):
        raise ModelError(f"model {name!r}: its adapter adapts {twice} in two ways, which peft merges wrongly")
    _separate(adapted)
    return adapted.merge_and_unload()


def _check_kind(config: Any, name: str) -> None:
    """Raise `ModelError` for an adapter that cannot be merged into the weights of its model, by its config."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ModelError(f"model {name!r}: an adapter of type {kind} has no weights to merge into those of the model")
    if getattr(config, "layer_replication", None):
        raise ModelError(f"model {name!r}: its adapter repeats layers of the model (layer_replication): not supported")
    start = str(getattr(config, "init_lora_weights", True))
    if start.startswith(_CHANGED_BY):
        raise ModelError(
            f"model {name!r}: its adapter (init_lora_weights {start!r}) was trained beside weights that no file has: "
            "convert it on saving with peft's path_initial_model_for_weight_conversion"
        )


def _check_numbers(weights: dict[str, Any], adapter: Adapter, name: str) -> None:
    """Raise `ModelError` for weights of an adapter that are not floating point, or not finite."""
    packed = [
        f"{key} is {weight.dtype}"
        for key, weight in weights.items()
        if str(weight.dtype) not in PLAIN_TYPES and (_LORA in key or key.endswith(".weight"))
    ]
    if packed:
        raise ModelError(f"model {name!r}: its adapter has weights that are not of floating point: {listed(packed)}")
    if unusable := not_finite(weights.items()):
        path = next(Path(adapter.source) / each for each in _OWN_WEIGHTS if (Path(adapter.source) / each).exists())
        raise ModelError(f"model {name!r}: its adapter cannot be merged: {path}: {not_finite_message(unusable)}")


def _is_repeated(key: str, weights: dict[str, Any]) -> bool:
    others = (weight for name, weight in weights.items() if name.endswith(_TOKENS) and name != key)
    return any(weight.shape == weights[key].shape and bool((weight == weights[key]).all()) for weight in others)


def _adapted_twice(adapted: Any) -> str | None:
    """The name of a module with LoRA around trained tokens, such as a tied unembedding; `None` without one.

    LoRA around several parameters of one module, such as those of experts, is merged well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    pairs = ((name[: at.start()], name) for name in layers for at in re.finditer(r"\.", name))
    twice = (
        outer
        for outer, inner in pairs
        if outer in layers and not all(hasattr(layers[each], "parameter_name") for each in (outer, inner))
    )
    return next((name.rpartition(".")[2] for name in twice), None)


def _separate(adapted: Any) -> None:
    """Give modules that an adapter changes weights of their own where they share them, such as a tied embedding.

    peft adds what it merges to the shared weight, and so also to that of a module for which it is not meant.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Parameter

    owners = Counter(id(weight) for module in adapted.modules() for weight in module.parameters(recurse=False))
    for module in adapted.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, weight in list(base.named_parameters(recurse=False)) if base is not module else ():
            if owners[id(weight)] > 1:
                setattr(base, name, Parameter(weight.detach().clone(), requires_grad=False))


def _resize(model: Any, weights: dict[str, Any], name: str) -> None:
    """Give a model the vocabulary of an adapter that was trained with additional tokens."""
    outer = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {module: path for path, module in model.named_modules()}
    saved = {
        kind: weight.shape[0]
        for kind, module in outer.items()
        for key, weight in weights.items()
        if f".{names.get(module)}." in f".{key}" and key.endswith(".weight") and _LORA not in key
    }
    n_tokens = max(saved.values(), default=0)
    if n_tokens <= outer["input"].weight.shape[0]:
        return
    is_tied = outer["output"] is not None and outer["input"].weight is outer["output"].weight
    if len(saved) < 2 and not is_tied:
        raise ModelError(
            f"model {name!r}: its adapter adds tokens at the {next(iter(saved))} only: expected {n_tokens} rows of "
            "both embedding and unembedding, which would be random for the new tokens"
        )
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
