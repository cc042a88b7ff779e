"""Finding checkpoints, reading their unprocessed weights, and computing their fingerprints."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tlcapture.errors import ModelError
from tlcapture.models.checkpoints import adapters, embedded, quantised
from tlcapture.models.checkpoints.files import (
    PLAIN_TYPES,
    damage,
    generation_config_fault,
    processor_template,
    stored_types,
)
from tlcapture.models.checkpoints.sources import source_of
from tlcapture.models.checkpoints.text_models import auto_class_of, name_class, text_config_of
from tlcapture.models.checkpoints.untaken import listed, untaken
from tlcapture.models.processes import no_processes
from tlcapture.text import dtype_name
from tlcapture.version import installed

_TOKENIZER_FILES = ("*tokenizer*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.gguf")
_ATTENTION = "eager"  # the only implementation that returns attention patterns
# What a config may ask a model to return besides its logits, and in which form.
_OUTPUTS = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}
_EXACT = frozenset([PLAIN_TYPES["torch.float32"], PLAIN_TYPES["torch.float64"]])
_HALF = (torch.float16, torch.bfloat16)
_UNQUANTISED = (*_HALF, torch.float32, torch.float64)


def fetch(name: str, kind: str, source: str, **options: Any) -> Any:
    """Call `from_pretrained(source)` of the transformers class `kind`; never runs code of the checkpoint.

    Raises `ModelError`, naming the model `name`, if it fails.
    """
    import transformers

    try:
        # Explicit, because transformers otherwise asks whether to run the code of a checkpoint.
        with no_processes():
            return getattr(transformers, kind).from_pretrained(source, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for invalid folders
        fault = damage(Path(source)) if Path(source).is_dir() else None
        if fault is not None:
            raise ModelError(f"model {name!r} cannot be loaded: {fault}") from None
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {name!r} comes with code of its own, which is never run: use weights of an architecture and a "
                f"tokenizer that transformers {installed('transformers')} has"
            ) from None
        reason = " ".join((f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)).split())
        raise ModelError(
            f"model {name!r} cannot be loaded: expected {embedded.NAME!r}, a folder of Hugging Face weights, a GGUF "
            f"file, or the name of a model on the hub: {reason[:300]}"
        ) from None


def fetch_config(name: str, source: str) -> Any:
    """The config of the causal language model of a checkpoint, or of the model that an adapter is for.

    It states a quantisation only if the weights stay quantised. Raises `ModelError` if it cannot be loaded.
    """
    config = _whole_config(name, source)
    if quantised.is_dequantised(config):
        quantised.forget(config)
    found = text_config_of(config)
    name_class(found)
    for what, key in (("layers", "num_hidden_layers"), ("positions", "max_position_embeddings")):
        stated = getattr(found, key, 1)
        if isinstance(stated, int) and stated < 1:
            raise ModelError(f"model {name!r} has {stated} {what} by its config.json: expected at least one")
    return found


def fetch_tokenizer(name: str, source: str) -> Any:
    """The tokenizer of a checkpoint: an adapter's own, or that of the model that it is for.

    Raises `ModelError` if the checkpoint has none: transformers then makes one that knows special tokens only.
    """
    adapter = adapters.adapter_of(source)
    if adapter is not None and adapter.tokenizer_source != source:
        return fetch_tokenizer(name, _base_of(adapter, name, weights=False))
    advice = "copy tokenizer.json and tokenizer_config.json from the checkpoint that it was made from"
    try:
        tokenizer = fetch(name, "AutoTokenizer", source)
    except ModelError:
        folder = Path(source)
        if folder.is_dir() and not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
            raise ModelError(f"model {name!r} has no tokenizer files: {advice}") from None
        raise
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = processor_template(Path(source))
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    if len({*tokenizer.get_vocab().values()} - added) < 2:
        raise ModelError(f"model {name!r} has no tokenizer vocabulary: {advice}")
    return tokenizer


def fetch_weights(
    name: str, source: str, *, n_devices: int = 1, warn: Callable[[str], None] = lambda text: None
) -> Any:
    """The Hugging Face model in its checkpoint's dtype, in main memory or distributed over CUDA devices.

    An adapter is merged into the weights; weights are dequantised if transformers can do so without more packages.

    Args:
        warn: called with a text about weights in the files that no module takes.

    Raises `ModelError` if the checkpoint lacks weights, or packages that it needs are not installed.
    """
    adapter = adapters.adapter_of(source)
    if adapter is not None and adapter.base != source:
        base = _base_of(adapter, name, weights=True)
        return adapters.merged(fetch_weights(adapter.base, base, n_devices=n_devices, warn=warn), adapter, name)
    config = _config_for_weights(name, source)
    model, found = fetch(
        name,
        auto_class_of(config),
        source,
        dtype="auto",
        config=config,
        attn_implementation=_ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `_check_complete` names them
        **quantised.loading_options(config, name),
        **_distributed(n_devices),
        **({} if adapter is None else adapters.NOT_BY_TRANSFORMERS),
    )
    extra = untaken(found.get("unexpected_keys", ()), model.config)
    _check_complete(name, found, extra)
    if quantised.method_of(config) is None and Path(source).is_dir():
        types = {key: kind for key, kind in stored_types(Path(source)).items() if key not in extra}
        _check_types(name, types, model, warn)
    if extra:
        warn(
            f"model {name!r} has weights that no module takes, and which change nothing: {listed(extra)}: check that "
            "config.json belongs to these weights"
        )
    with quantised.refused_in_one_line(config, name):
        model = quantised.dequantised(model, config)
    return model if adapter is None else adapters.merged(model, adapter, name)


def _config_for_weights(name: str, source: str) -> Any:
    """The config with which the weights of a checkpoint are loaded; what it asks for beyond logits is switched off.

    Raises `ModelError` where the generation config beside it has no usable stop tokens.
    """
    # Not whatever implementation the file asks for, which need not be installed.
    config = fetch(name, "AutoConfig", source, attn_implementation=_ATTENTION)
    for part in (config, config.get_text_config()):
        for key in _OUTPUTS.keys() & vars(part).keys():
            setattr(part, key, _OUTPUTS[key])
    if fault := generation_config_fault(Path(source)):
        raise ModelError(f"model {name!r} cannot be loaded: {fault}")
    return config


def _check_complete(name: str, found: Mapping[str, Any], extra: list[str]) -> None:
    """Raise `ModelError` if weights are missing, or have other shapes or a quantisation that the config does not state.

    Args:
        found: the loading info of transformers.
        extra: the names of weights that no module takes.
    """
    if unfit := sorted(found.get("mismatched_keys", ())):
        key, stored, expected = unfit[0]
        raise ModelError(
            f"model {name!r} has weights of other shapes than its config.json asks for: {key} is {list(stored)}, "
            f"expected {list(expected)}: check that config.json belongs to these weights"
        )
    if missing := sorted(map(str, found.get("missing_keys", ()))):
        others = f"; no module takes its {listed(extra)}: expected names as transformers saves them" if extra else ""
        raise ModelError(
            f"model {name!r} is incomplete: its checkpoint has no fitting {listed(missing)}; they would be initialised "
            f"at random{others}"
        )
    if quantised.are_scales(extra):
        raise ModelError(
            f"model {name!r} has weights that only quantised checkpoints have ({listed(extra)}): expected a "
            "quantization_config in config.json"
        )


def _check_types(name: str, types: Mapping[str, str], model: Any, warn: Callable[[str], None]) -> None:
    """Raise `ModelError` for stored weights that are not floating point; warn of those that loading has rounded.

    Args:
        types: the stored type of each weight, as safetensors calls it.
    """
    if packed := quantised.of_other_types(types, model):
        raise ModelError(
            f"model {name!r} has weights of a type that only quantised checkpoints have ({listed(packed)}): "
            "expected a quantization_config in config.json, or weights of floating point"
        )
    if types and {*types.values()} <= _EXACT and model.dtype in _HALF:
        warn(
            f"model {name!r} has weights in 32 bits that are rounded to {dtype_name(model.dtype)}, since its "
            "config.json says so: change dtype there to use them as they are"
        )


def weight_folders(name: str, source: str) -> list[Path]:
    """The folders whose files have the weights of a model: its own, and those of the models that adapters are for."""
    adapter = adapters.adapter_of(source)
    if adapter is None or adapter.base == source:
        return [Path(source)]
    return [Path(source), *weight_folders(adapter.base, _base_of(adapter, name, weights=True))]


def _whole_config(name: str, source: str) -> Any:
    adapter = adapters.adapter_of(source)
    if adapter is not None and adapter.base != source:
        return _whole_config(adapter.base, _base_of(adapter, name, weights=False))
    return fetch(name, "AutoConfig", source)


def _base_of(adapter: adapters.Adapter, name: str, *, weights: bool) -> str:
    """The folder of the model that an adapter is for; raises `ModelError`, naming both, if it is not found."""
    try:
        return source_of(adapter.base, weights=weights)
    except ModelError as error:
        raise ModelError(f"model {name!r} is an adapter: {error}") from None


def _distributed(n_devices: int) -> dict[str, Any]:
    """Options of `from_pretrained` that distribute a model over the first devices, within their free memory."""
    if n_devices == 1:
        return {}
    free = {device: torch.cuda.mem_get_info(device)[0] for device in range(n_devices)}
    return {"device_map": "balanced", "max_memory": free}


def count_parameters(config: Any) -> int:
    """Number of parameters of a Hugging Face config, tied ones counted once. Allocates no memory for them."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights in place, with the values that transformers would give a model that it loads in this dtype.

    Weights that transformers keeps in float32, such as those of some routers, stay so. Buffers, such as rotary
    frequencies, keep their precision; those that were rounded to 16 bits, such as the scale of Gemma's embedding, are
    computed again. Packed weights of quantised checkpoints stay packed.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    kept = re.compile("|".join(map(re.escape, plan))) if plan else None
    for name, weight in model.named_parameters():
        if weight.dtype in _UNQUANTISED:
            weight.data = weight.data.to(torch.float32 if kept is not None and kept.search(name) else dtype)
    _compute_again(model, model, dtype)


def _compute_again(module: Any, owner: Any, dtype: torch.dtype) -> None:
    """Let transformers compute buffers again that no file holds and that were rounded to another dtype of 16 bits.

    `owner` is the innermost module around `module` that knows how to initialise it.
    """
    owner = module if hasattr(module, "_init_weights") else owner
    buffers = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
    rounded = {name: each for name, each in buffers.items() if each is not None and each.dtype in {*_HALF} - {dtype}}
    if rounded:
        for weight in (*module.parameters(), *module.buffers()):
            weight._is_hf_initialized = True  # which transformers then leaves as it is
        for name, buffer in rounded.items():
            module._buffers[name] = buffer.to(dtype, copy=True)
        owner._init_weights(module)
    for child in module.children():
        _compute_again(child, owner, dtype)


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that identify a checkpoint: a hash over names, shapes and samples of all weights.

    `load_model` computes it before casting the weights, so that it does not depend on the compute dtype.
    """
    return fingerprint_of(sorted(model.named_parameters()))


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The fingerprint of weights in the order of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().flatten() if weight.is_contiguous() else weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress progress bars and deprecation warnings of the libraries."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    level = hf_logging.get_verbosity()
    root = logging.getLogger()
    root_level = root.level
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(root_level)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
