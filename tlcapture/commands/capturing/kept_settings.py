"""Whether the captures that `--skip-existing` keeps were made with the settings that are asked for now."""

from __future__ import annotations

from collections.abc import Mapping

from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.generation.sampling.checkpoint_sampling import is_recorded
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.names import PromptId
from tlcapture.prompts.response_lengths import THINKING_TOKENS
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.text import counted, dtype_name


def other_sampling(kept: Mapping[PromptId, KnownCapture], options: CaptureOptions) -> list[PromptId]:
    """Names of kept captures whose responses were sampled with other settings; none if tokens are given."""
    if options.responses_from is not None:
        return []
    return [name for name, capture in kept.items() if _is_sampled_otherwise(capture, options)]


def other_computation(
    kept: Mapping[PromptId, KnownCapture], load: ModelLoader, model: Model | ModelOutline
) -> list[PromptId]:
    """Names of kept captures whose activations were computed in another dtype or on another engine.

    Without the weights of the model, only an engine and a dtype that are named can be compared.
    """
    asked = {"engine": model.engine, "dtype": dtype_name(model.dtype)} if isinstance(model, Model) else load.named
    return [
        name
        for name, capture in kept.items()
        if any(capture.metadata.get(each) not in (None, value) for each, value in asked.items())
    ]


def other_weights(kept: Mapping[PromptId, KnownCapture], model: Model | ModelOutline) -> str | None:
    """Why new captures must not be put beside the kept ones: the model had other weights; `None` if it had the same."""
    if not isinstance(model, Model):
        return None
    recorded = [capture.metadata.get("model_fingerprint") for capture in kept.values()]
    n_others = sum(each not in (None, model.fingerprint) for each in recorded)
    if not n_others:
        return None
    return (
        f"--skip-existing would put new captures beside {counted(n_others, 'capture')} of a model of the same name "
        "with other weights: use another --experiment, or leave out --skip-existing to capture all prompts again"
    )


def _is_sampled_otherwise(saved: KnownCapture, options: CaptureOptions) -> bool:
    asked = {"temperature": options.sampling.temperature, "max_new_tokens": _most_tokens(saved, options)}
    if options.sampling.temperature != 0:
        asked["seed"] = options.sampling.seed
    differs = any(saved.metadata.get(name) not in (None, value) for name, value in asked.items() if value is not None)
    return differs or not is_recorded(options.sampling, saved.metadata)


def _most_tokens(saved: KnownCapture, options: CaptureOptions) -> int | None:
    """The maximum length that a saved response should have had; `None` where its own is one by default.

    The default is longer for a model that thinks (unless thinking is off), within the context.
    """
    asked, recorded = options.max_new_tokens, saved.metadata.get("max_new_tokens")
    may_be_longer = options.longer_where_thinking and "thinking" in saved.metadata
    is_by_default = may_be_longer and isinstance(recorded, int) and asked <= recorded <= THINKING_TOKENS
    return None if is_by_default else asked
