"""The quick check on loading: a short prompt through Hugging Face's own forward pass and through the engine.

It catches an architecture that TransformerLens computes differently. A passed check is remembered in the cache folder
by the fingerprint and config of the checkpoint, the engine, dtype and device, and the versions of the libraries.
`tlcapture doctor` is the full check.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import ModelError, StorageError
from tlcapture.models.checkpoints.checkpoint import cast
from tlcapture.models.deviation import allowed, deviation
from tlcapture.models.engines.base import Model
from tlcapture.models.layer_inputs import layer_inputs
from tlcapture.models.memory import free_memory
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.files import write_json
from tlcapture.text import shell_join
from tlcapture.version import __version__, installed
from tlcapture.views.hooks import hook

N_TOKENS = 12
N_DECODED = 2  # tokens that the engine reads one by one, after the others
_LIBRARIES = ("transformer_lens", "transformers", "torch")
# Entries of a config that say where it came from, not what the model computes.
_ORIGIN = ("_name_or_path", "_commit_hash", "transformers_version", "architectures")


@dataclass(frozen=True, eq=False)
class QuickReference:
    """Hugging Face's activations for a short prompt, in float32 on the CPU.

    `hidden[layer]` is the input of a layer. `rounding` holds the deviations of Hugging Face's own run in 16 bits from
    `hidden`, and last from `logits`; `None` if the model ran in float32, or if float32 did not fit in memory.
    """

    token_ids: tuple[int, ...]
    hidden: tuple[Float[Tensor, "n_tokens d_model"], ...]
    logits: Float[Tensor, "n_tokens d_vocab"]
    rounding: tuple[float, ...] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether no activation and no logit is NaN or infinity."""
        return all(bool(each.isfinite().all()) for each in (*self.hidden, self.logits))

    @classmethod
    def of(cls, hf_model: Any) -> QuickReference:
        """Run the short prompt. A model in 16 bits runs in float32 as well, if memory allows; its dtype is restored."""
        run = _run(hf_model, _short_prompt(hf_model))
        dtype = next(hf_model.parameters()).dtype
        is_packed = bool(getattr(hf_model, "is_quantized", False))
        if dtype == torch.float32 or is_packed or not _fits_in_float32(hf_model):
            return run
        cast(hf_model, torch.float32)
        exact = _run(hf_model, run.token_ids)
        cast(hf_model, dtype)
        pairs = zip([*run.hidden, run.logits], [*exact.hidden, exact.logits], strict=True)
        return cls(run.token_ids, exact.hidden, exact.logits, tuple(deviation(one, other) for one, other in pairs))


@dataclass(frozen=True)
class PassedCheck:
    """The record that a model has passed the quick check; `facts` are what the result depends on."""

    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, config: Any, **facts: object) -> PassedCheck:
        """The record for a model by its Hugging Face config and further facts, such as its fingerprint."""
        content = {key: value for key, value in config.to_dict().items() if key not in _ORIGIN}
        hashed = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
        versions = {"tlcapture": __version__} | {library: installed(library) for library in _LIBRARIES}
        every = {**facts, "config": hashed, **versions}
        return cls(tuple((key, str(value)) for key, value in every.items()))

    @property
    def path(self) -> Path:
        """The file of the record in the cache folder."""
        digest = hashlib.blake2b(repr(self.facts).encode(), digest_size=8).hexdigest()
        return cache_folder() / "checked" / f"{digest}.json"

    def exists(self) -> bool:
        """Whether the check has been passed before."""
        return self.path.is_file()

    def remember(self) -> None:
        """Write the record; if the cache folder is not writable, the check is repeated the next time."""
        with suppress(StorageError):
            write_json(self.path, dict(self.facts), indent=True)


@torch.no_grad()
def quick_check(model: Model, reference: QuickReference) -> None:
    """Compare hidden states at all layers and logits with Hugging Face's.

    In 16 bits, where both are rounded, the bound is four times Hugging Face's own deviation from float32. Activations
    that are not finite in the reference are not compared: captures report them.

    Raises `ModelError`, which names the layer, if one deviates by more than rounding.
    """
    ours = _engine_run(model, len(reference.hidden), reference.token_ids)
    theirs = [*reference.hidden, reference.logits]
    widest = None
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if not other.isfinite().all():
            return
        if reference.rounding is not None:
            widest = max(widest or 0.0, reference.rounding[index])
        found, bound = deviation(one, other), allowed(model.dtype, widest)
        if not found <= bound:  # NaN too
            where = f"the input of layer {index}" if index < len(reference.hidden) else "the logits"
            raise ModelError(_differs(model, where, found, bound))


def _differs(model: Model, where: str, found: float, bound: float) -> str:
    other = "try --engine bridge, " if model.engine == "hooked" else ""
    lens, doctor = installed("transformer_lens"), shell_join(["tlcapture", "doctor", "--model", model.name])
    return (
        f"{model.name}: TransformerLens {lens} on engine {model.engine} computes something other "
        f"than Hugging Face: {where} deviates by {found:.2g} of its norm, {bound:.1g} allowed; {other}see the full "
        f"check with '{doctor}', or skip this one with --no-check"
    )


def _engine_run(model: Model, n_hidden: int, token_ids: tuple[int, ...]) -> list[Tensor]:
    """The inputs of the first `n_hidden` layers and the logits, each `[n_tokens, ...]`."""
    last = hook("residual_out", model.n_layers - 1)
    names = [hook("residual_in", layer) for layer in range(n_hidden)]
    ids, n_prompt = torch.tensor([token_ids]), max(1, len(token_ids) - N_DECODED)
    state, steps = model.start(1), []
    for start, stop in [(0, n_prompt), *((index, index + 1) for index in range(n_prompt, len(token_ids)))]:
        tokens = ids[:, start:stop]
        step = model.step(tokens, torch.ones_like(tokens), state, frozenset([*names, last]), want_logits=False)
        steps.append({name: step.cache[name][0].cpu() for name in [*names, last]})
    joined = {name: torch.cat([step[name] for step in steps]) for name in [*names, last]}
    return [*(joined[name] for name in names), model.unembed(joined[last])]


@torch.no_grad()
def _run(hf_model: Any, token_ids: tuple[int, ...]) -> QuickReference:
    device = hf_model.get_input_embeddings().weight.device
    ids = torch.tensor([token_ids], device=device)
    with layer_inputs(hf_model) as inputs:
        out = hf_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    n_layers = hf_model.config.get_text_config().num_hidden_layers
    hidden = inputs if len(inputs) == n_layers else (out.hidden_states or ())[:-1]
    # Some architectures return other states than one per layer.
    fits = len(hidden) == n_layers and all(state.ndim == 3 for state in hidden)
    states = tuple(state[0].float().cpu() for state in hidden) if fits else ()
    return QuickReference(token_ids, states, out.logits[0].float().cpu())


def _short_prompt(hf_model: Any) -> tuple[int, ...]:
    """Fixed token ids, spread over the vocabulary, without the ids that the config gives a meaning."""
    text = hf_model.config.get_text_config()
    special = set(_ids_in(hf_model.config.to_dict()))
    ids = ((7 + 7919 * index) % int(text.vocab_size) for index in range(N_TOKENS + len(special) + 1))
    n_tokens = min(N_TOKENS, getattr(text, "max_position_embeddings", None) or N_TOKENS)
    return tuple([number for number in ids if number not in special][:n_tokens])


def _ids_in(config: dict[Any, Any]) -> list[int]:
    """The ids of special tokens in a config and the configs in it."""
    found: list[int] = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += _ids_in(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            found += [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
    return found


def _fits_in_float32(hf_model: Any) -> bool:
    """Whether the additional memory of casting the weights to float32 is free, in main memory or on their device."""
    needed: dict[torch.device, int] = {}
    for weight in hf_model.parameters():
        needed[weight.device] = needed.get(weight.device, 0) + weight.numel() * max(0, 4 - weight.element_size())
    return all(size < free_memory(device) / 2 for device, size in needed.items())
