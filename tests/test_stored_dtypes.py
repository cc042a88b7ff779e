"""A checkpoint that is cast has the numbers that transformers gives a model that it loads in that dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.families import FAMILIES
from tlcapture.models.checkpoints.checkpoint import cast, fetch_weights
from tlcapture.models.checkpoints.text_models import auto_class_of


def _of_width_40(name: str) -> dict[str, Any]:
    """A config whose embedding is multiplied by the root of 40, which 16 bits round."""
    return {**tiny.CONFIGS[name]().to_dict(), "hidden_size": 40}


_SCALED = {
    "gemma": lambda: transformers.GemmaConfig(**_of_width_40("gemma")),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_of_width_40("gemma3")),
    "gemma3 with images": lambda: transformers.Gemma3Config(
        text_config=_of_width_40("gemma3"), vision_config=tiny.VISION, mm_tokens_per_image=4
    ),
}


@pytest.mark.parametrize("name", _SCALED)
def test_a_checkpoint_in_16_bits_is_in_32_what_transformers_loads_in_32(name: str, tmp_path: Path) -> None:
    config = _SCALED[name]()
    kind = getattr(transformers, auto_class_of(config))
    torch.manual_seed(0)
    kind.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    exact = kind.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = fetch_weights(name, str(tmp_path))
    weights = [weight.clone() for weight in model.parameters()]
    cast(model, torch.float32)
    for (path, ours), theirs in zip(model.named_buffers(), exact.buffers(), strict=True):
        assert torch.equal(ours, theirs), path
    assert all(torch.equal(ours, before.float()) for ours, before in zip(model.parameters(), weights, strict=True))


def test_weights_that_transformers_keeps_in_32_bits_stay_so(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["ERNIE 4.5 MoE"]())
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast(model, torch.bfloat16)
    for (path, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert ours.dtype == other.dtype, path
        assert torch.equal(ours, other), path
