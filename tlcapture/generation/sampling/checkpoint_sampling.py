"""The sampling in a checkpoint's own generation config: followed if asked for, otherwise mentioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tlcapture.errors import InputError
from tlcapture.generation.sampling.next_token import (
    CHECKPOINT,
    DEFAULT_TEMPERATURE,
    PLAIN,
    SAMPLINGS,
    Sampling,
    checked_stop,
)
from tlcapture.generation.sampling.processors import FOR_SAMPLING, LogitProcessors, LogitRules, PromptTokens
from tlcapture.models.loading import Model
from tlcapture.text import first_line

# Values with which a setting changes nothing, apart from None, 0 and empty lists.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "repetition_penalty": (1,),
    "top_p": (1,),
    "typical_p": (1,),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
}
# What generate does where a generation config does not set it.
_GENERATE_TEMPERATURE, _GENERATE_TOP_K = 1.0, 50
# Settings of other ways to generate than choosing one token after another from one model's logits.
_OTHER_WAYS = (
    "num_beams",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "guidance_scale",
    "watermarking_config",
    "token_healing",
)
_STOP = "stop_strings"


@dataclass(frozen=True)
class CheckpointSampling:
    """The sampling of a checkpoint, which is known once the model is loaded.

    A temperature and rules that are `given`, by the names of a generation config, take the place of its own; texts in
    `stop` end responses, too.
    """

    temperature: float | None = None
    seed: int = 0
    source: str = CHECKPOINT
    given: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        checked = Sampling(0 if self.temperature is None else self.temperature, self.seed, stop=self.stop, **self.given)
        for name in ("seed", "stop"):
            object.__setattr__(self, name, getattr(checked, name))


AskedSampling = Sampling | CheckpointSampling


def asked_sampling(
    source: str, temperature: float | None, seed: int, stop: Sequence[str] = (), **rules: Any
) -> AskedSampling:
    """The sampling of options; the temperature is 0.7, or the checkpoint's own with `source` `checkpoint`.

    Args:
        stop: texts that end a response.
        rules: `top_p`, `top_k`, `min_p` and `repetition_penalty`; `None` where one is not given.

    Raises `InputError` for an unknown source or an invalid value.
    """
    if source not in SAMPLINGS:
        raise InputError(f"no sampling {source!r}: choose one of {', '.join(SAMPLINGS)}")
    given = {name: value for name, value in rules.items() if value is not None}
    if source == CHECKPOINT:
        return CheckpointSampling(temperature, seed, given=given, stop=stop)
    return Sampling(DEFAULT_TEMPERATURE if temperature is None else temperature, seed, stop=stop, **given)


def sampling_for(asked: AskedSampling, model: Model) -> Sampling:
    """The requested sampling of a model; a checkpoint's sampling follows Hugging Face's `generate`.

    Raises:
        InputError: the checkpoint asks for rules that are not supported, or for invalid values.
    """
    if isinstance(asked, Sampling):
        return asked
    config = model.generation_config
    if config is None:
        raise InputError(f"--sampling checkpoint: {model.name} has no generation config; use --temperature")
    other = _settings(config, _OTHER_WAYS)
    if getattr(config, "do_sample", None):
        other.pop("penalty_alpha", None)  # contrastive search does not sample
    if other:
        raise InputError(
            f"--sampling checkpoint: {_described(other)} of the checkpoint cannot be followed; leave it out"
        )
    temperature = asked.temperature
    if temperature is None:
        own = getattr(config, "temperature", None)
        temperature = (_GENERATE_TEMPERATURE if own is None else own) if getattr(config, "do_sample", None) else 0
    found = _settings(config, tuple(LogitRules.__dataclass_fields__))
    if getattr(config, "top_k", None) is None:
        found["top_k"] = _GENERATE_TOP_K
    found |= asked.given
    try:
        stop = (*checked_stop(getattr(config, _STOP, None) or ()), *asked.stop)
        sampling = Sampling(temperature, asked.seed, LogitRules(**found), CHECKPOINT, stop=stop)
        _try_out(sampling, model)
    except (ValueError, TypeError, IndexError, InputError) as error:
        raise InputError(f"--sampling checkpoint: the generation config is not valid: {first_line(error)}") from None
    return sampling


def is_recorded(asked: AskedSampling, metadata: Mapping[str, Any]) -> bool:
    """Whether a capture was sampled by the requested rules and stop texts, according to its metadata.

    For a checkpoint's sampling only given values are compared; its own rules are unknown before it is loaded.
    """
    recorded = metadata.get("sampling") or {"source": PLAIN}
    if isinstance(asked, Sampling):
        return bool(recorded == asked.record().get("sampling", {"source": PLAIN}))
    given = Sampling(**asked.given).rules.active(greedy=False)
    has_rules = all(recorded.get(name) in (None, value) for name, value in given.items())  # None: it was greedy
    has_stop = set(asked.stop) <= set(recorded.get("stop", ()))
    return recorded.get("source") == asked.source and has_rules and has_stop


def without_effect(sampling: Sampling, samples: int | None = None) -> str | None:
    """The warning for rules that only affect sampling, when the choice is greedy."""
    given = sampling.without_effect if sampling.source == PLAIN else ()
    notes = [f"{' and '.join(given)} {'changes' if len(given) == 1 else 'change'} nothing"] if given else []
    notes += ["all samples of a prompt are the same"] if sampling.temperature == 0 and (samples or 1) > 1 else []
    return f"temperature 0 is greedy: {', and '.join(notes)}" if notes else None


def unfollowed(sampling: Sampling, model: Model) -> str | None:
    """One sentence on settings of the checkpoint's generation config that the sampling does not follow."""
    if sampling.source != PLAIN or model.generation_config is None:
        return None
    names = [name for name in LogitRules.__dataclass_fields__ if sampling.temperature or name not in FOR_SAMPLING]
    rules, other = (_settings(model.generation_config, each) for each in ((*names, _STOP), _OTHER_WAYS))
    if not rules and not other:
        return None
    said = f"the checkpoint's own sampling is not followed: {_described({**rules, **other})}"
    return said if other else f"{said} (--sampling checkpoint follows it)"


def _settings(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a generation config that have an effect."""
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if _changes(name, value)}


def _changes(name: str, value: Any) -> bool:
    if value is None or name.endswith("token_id"):  # 0 is a token
        return value is not None
    return value not in ([], {}, 0, *_NEUTRAL.get(name, ()))


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:40]}" for name, value in settings.items())


def _try_out(sampling: Sampling, model: Model) -> None:
    """Apply every rule once, so that an invalid value is found before any prompt runs."""
    prompts = [PromptTokens((0,), frozenset({0}), max_new_tokens=1)]
    LogitProcessors(sampling.rules, sampling.temperature, prompts)(torch.zeros(1, model.d_vocab))
