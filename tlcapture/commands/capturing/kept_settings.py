"""Whether the captures that `--skip-existing` keeps were made with the settings that are asked for now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.generation.sampling.checkpoint_sampling import is_recorded
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.names import PromptId
from tlcapture.prompts.response_lengths import THINKING_TOKENS
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import counted, dtype_name


def notes_of_kept(
    layout: Layout,
    capture_set: str,
    kept: Mapping[PromptId, KnownCapture],
    options: CaptureOptions,
    load: ModelLoader,
    model: Model | ModelOutline | None,
) -> list[str]:
    """Warnings about kept captures of a set that were made with other settings.

    The computation is compared only with that of new captures, which `model` makes. Without its weights, only an engine
    and a dtype that are named can be compared.
    """
    sampled = {} if options.responses_from is not None else kept
    names = [name for name, capture in sampled.items() if _is_sampled_otherwise(capture, options)]
    notes = _note(capture_set, names, "made with another temperature, seed, sampling or --max-new-tokens")
    if model is not None:
        asked = {"engine": model.engine, "dtype": dtype_name(model.dtype)} if isinstance(model, Model) else load.named
        names = [name for name, capture in kept.items() if _is_computed_otherwise(capture, asked)]
        notes += _note(capture_set, names, "computed in another dtype or on another engine")
    if options.save_dtype != "auto":
        names = [name for name in kept if _is_stored_otherwise(layout.residual(capture_set, name), options.save_dtype)]
        notes += _note(capture_set, names, f"stored in another dtype than --save-dtype {options.save_dtype}")
    return notes


def _note(capture_set: str, names: Sequence[PromptId], how: str) -> list[str]:
    if not names:
        return []
    captures = f"{len(names)} captures" if len(names) > 1 else f"the capture of prompt {names[0]}"
    return [f"{capture_set}: kept {captures} {how}: leave out --skip-existing to capture again"]


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


def _is_computed_otherwise(saved: KnownCapture, asked: Mapping[str, str]) -> bool:
    return any(saved.metadata.get(name) not in (None, value) for name, value in asked.items())


def _is_stored_otherwise(raw: Path, dtype: str) -> bool:
    """Whether a raw file holds activations in another dtype; not if there is none, as with `--projections-only`."""
    return raw.is_file() and dtype_name(Capture.open(raw).prompt.residual.points.dtype) != dtype


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
