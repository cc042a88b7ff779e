"""The record of where activations come from, for captures and for vectors. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tlcapture.text import dtype_name
from tlcapture.version import __version__
from tlcapture.views.hooks import HOOKS, POINTS, at_any_layer, hook, mixer_hook

if TYPE_CHECKING:
    from tlcapture.models.loading import Model

RAW = "none"  # weight processing: the weights of the checkpoint, unchanged
SAME_COMPUTATION = ("model_fingerprint", "engine", "dtype", "interventions")  # keys of metadata
LAYERS = "layer L is block L, counted from 0: residual_out of layer 0 is the first block's output"


def model_record(model: Model) -> dict[str, Any]:
    """The model and how it was run, which must agree for activations to be comparable."""
    return {
        "engine": model.engine,
        "dtype": dtype_name(model.dtype),
        "weight_processing": RAW,
        "model_fingerprint": model.fingerprint,
        "model_revision": model.revision,
        **model.adapted,
        "layer_convention": LAYERS,
        "tlcapture_version": __version__,
    }


def sample_record(sample: int | None) -> dict[str, Any]:
    """The number of a capture's sample as metadata; empty if the prompt has one response."""
    return {} if sample is None else {"sample": sample}


def template_record(merged: Sequence[str], dropped: Sequence[str]) -> dict[str, Any]:
    """Messages that the chat template merged or left out, as metadata; empty if there are none."""
    return {name: list(each) for name, each in (("merged", merged), ("dropped", dropped)) if each}


def dropped_warning(dropped: Sequence[str]) -> str:
    """The warning for a prompt from which the chat template drops something."""
    kinds = sorted({each.split(" of message ")[0] for each in dropped})
    which = " and ".join("the thinking of earlier messages" if each == "thinking" else f"{each!r}" for each in kinds)
    return f"the chat template leaves out {which} (metadata: dropped)"


def no_answer_warning(names: Sequence[str], *, has_switch: bool) -> str:
    """The warning for prompts whose responses were cut off before their answers began, with what helps.

    `has_switch` says whether thinking can be turned off.
    """
    which = (
        names[0] if len(names) == 1 else f"{len(names)} prompts ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    )
    end = "the response ends" if len(names) == 1 else "responses end"
    or_off = ", or try --thinking off" if has_switch else ""
    return f"{which}: {end} within thinking, without an answer: raise --max-new-tokens{or_off}"


def conversation_record(
    messages: Sequence[Mapping[str, Any]], template_args: Mapping[str, Any], thinking: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A conversation, values for the chat template, and the markers of thinking, as metadata; empty without them."""
    record = {
        "messages": [dict(message) for message in messages],
        "template_args": dict(template_args),
        "thinking": dict(thinking or {}),
    }
    return {name: value for name, value in record.items() if value}


def variant_record(variant: str | None, interventions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The variant and the interventions as metadata; empty without them."""
    record = {"variant": variant, "interventions": [dict(each) for each in interventions]}
    return {name: value for name, value in record.items() if value}


def point_hooks(model: Model, *, attn_out: bool, points: Iterable[str] = POINTS) -> dict[str, str]:
    """The hook of each captured residual point, and of `attn_out` if it is captured."""
    hooks = {point: HOOKS[point] for point in [*points, *(["attn_out"] if attn_out else [])]}
    if "after_attn" in hooks and hook("after_attn", 0) not in model.hook_names:
        hooks["after_attn"] = f"{HOOKS['residual_in']} + {at_any_layer(mixer_hook(0, model.hook_names))}"
    return hooks


def is_same_computation(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two captures, given their metadata, were computed by the same model in the same way."""
    return all(one.get(key) == other.get(key) for key in SAME_COMPUTATION)


def now() -> str:
    """The present time in UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
