"""A model's mean activations on ordinary prompts: a reference for rises and for random directions.

    extraction/reference.pt     attn_out_reference.pt for that component

`evaluate` stores, for each prompt of the packaged prompt sets, the mean activation over the prompt (its first token
left out) and over the model's greedy response, at every layer. A direction's rises over these prompts follow from
them, whether it is a trait's vector or random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import StorageError
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, read_tensors, write_tensors
from tlcapture.storage.tensors import described, is_plain

FORMAT_VERSION = 1
FEWEST_PROMPTS = 8  # with fewer, no deviation of rises can be relied on

Means = Float[Tensor, "n_layers n_prompts d_model"]


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean activations of prompts and of responses, of one component.

    Attributes:
        model_fingerprint: the fingerprint of the model that ran.
        made_from: a digest of the prompts as token ids.
        prompts: names of the prompts, `{prompt_set}/{id}`.
        prompt_means, response_means: `[n_layers, n_prompts, d_model]`, in float32.
    """

    model_fingerprint: str
    made_from: str
    prompts: Sequence[str]
    prompt_means: Means
    response_means: Means

    def fits(self, n_layers: int, d_model: int) -> bool:
        """Whether it belongs to a model of this shape."""
        return self.response_means.shape[0] == n_layers and self.response_means.shape[2] == d_model

    def write(self, layout: Layout, component: str) -> Written:
        """Write the reference next to the experiment's vectors."""
        return write_tensors(layout.reference(component), {"format_version": FORMAT_VERSION, **vars(self)})


def read_reference(layout: Layout, component: str) -> Reference | None:
    """The reference beside an experiment's vectors; `None` without one. Raises `StorageError` for a damaged one."""
    path = layout.reference(component)
    if not lexists(path):
        return None
    value = read_tensors(path)
    problem = _problem(value)
    if problem:
        again = command_line(layout, "evaluate")
        raise StorageError(f"{path}: not a valid reference: {problem}: remove it, and run '{again}' again")
    names = ("model_fingerprint", "made_from", "prompts", "prompt_means", "response_means")
    return Reference(**{name: value[name] for name in names})


def _problem(value: Any) -> str | None:
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        return f"expected format_version {FORMAT_VERSION}"
    for name in ("prompt_means", "response_means"):
        means = value.get(name)
        if not is_plain(means) or means.ndim != 3 or not means.isfinite().all():
            return f"{name}: expected a finite tensor [n_layers, n_prompts, d_model], got {described(means)}"
    prompts = value.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        return "prompts: expected a list of names"
    if value["prompt_means"].shape != value["response_means"].shape or value["prompt_means"].shape[1] != len(prompts):
        return "prompt_means, response_means and prompts differ in length"
    if not all(isinstance(value.get(name), str) for name in ("model_fingerprint", "made_from")):
        return "model_fingerprint or made_from is missing"
    return None
