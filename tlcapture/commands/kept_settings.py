"""Whether the captures that `--skip-existing` keeps were made with the settings that are asked for now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.capture_options import CaptureOptions
from tlcapture.generation.checkpoint_sampling import is_recorded
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.names import PromptId
from tlcapture.prompts.response_lengths import THINKING_TOKENS
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.text import counted, dtype_name

Difference = tuple[str, str]  # the setting of a kept capture, and the one asked for


def other_sampling(kept: Mapping[PromptId, KnownCapture], options: CaptureOptions) -> list[PromptId]:
    """Names of kept captures whose responses were sampled with other settings."""
    return [name for name, capture in kept.items() if any(_sampling(capture, options))]


def mixture(
    kept: Mapping[PromptId, KnownCapture],
    options: CaptureOptions,
    load: ModelLoader,
    model: Model | ModelOutline,
) -> str | None:
    """Why new captures must not be put beside the kept ones: these have other settings; `None` if they have the same.

    Without the weights of the model, only an engine and a dtype that are named can be compared.
    """
    if isinstance(model, Model):
        asked = {"engine": model.engine, "dtype": dtype_name(model.dtype), "model_fingerprint": model.fingerprint}
    else:
        asked = {name: value for name in ("engine", "dtype") if (value := getattr(load, name)) != "auto"}
    found = [
        differences
        for capture in kept.values()
        if (differences := [*_sampling(capture, options), *_computation(capture, asked)])
    ]
    if not found:
        return None
    before, now = (" and ".join(texts) for texts in zip(*found[0], strict=True))
    return (
        f"--skip-existing would put captures made with {now} beside {counted(len(found), 'capture')} made with "
        f"{before}: use the same settings, or leave out --skip-existing to capture all prompts again"
    )


def _sampling(saved: KnownCapture, options: CaptureOptions) -> Iterator[Difference]:
    """How the sampling of a capture differs; nothing of one whose tokens were given."""
    if options.responses_from is not None:
        return
    asked = {"temperature": options.sampling.temperature, "max_new_tokens": _most_tokens(saved, options)}
    if options.sampling.temperature != 0:
        asked["seed"] = options.sampling.seed
    for name, value in asked.items():
        recorded = saved.metadata.get(name)
        if value is not None and recorded not in (None, value):
            words = "--max-new-tokens" if name == "max_new_tokens" else name
            yield f"{words} {recorded}", f"{words} {value}"
    if not is_recorded(options.sampling, saved.metadata):
        yield "other sampling rules", "these"


def _computation(saved: KnownCapture, asked: Mapping[str, Any]) -> Iterator[Difference]:
    """How the computation of a capture's activations differs."""
    for name, value in asked.items():
        recorded = saved.metadata.get(name)
        if recorded not in (None, value):
            words = "weights of fingerprint" if name == "model_fingerprint" else name
            yield f"{words} {recorded}", f"{words} {value}"


def _most_tokens(saved: KnownCapture, options: CaptureOptions) -> int | None:
    """The maximum length that a saved response should have had; `None` where its own is one by default.

    The default is longer for a model that thinks (unless thinking is off), within the context.
    """
    asked, recorded = options.max_new_tokens, saved.metadata.get("max_new_tokens")
    may_be_longer = options.longer_where_thinking and "thinking" in saved.metadata
    is_by_default = may_be_longer and isinstance(recorded, int) and asked <= recorded <= THINKING_TOKENS
    return None if is_by_default else asked
