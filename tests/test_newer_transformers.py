"""Names that transformers 5.24 changed, on modules that call each other like those of a TransformerBridge.

`make test-fresh` runs the models themselves with the newest transformers.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from tlcapture.models.engines.newer_transformers import support_newer_transformers


class Attention(nn.Module):
    """Attention of transformers 5.24, which refuses the old names."""

    def forward(self, hidden: Any, cache: Any = None, **options: Any) -> Any:
        assert not {"past_key_values", "cache_params"} & options.keys()
        return cache


class OldAttention(nn.Module):
    """Attention of transformers 5.23."""

    def forward(self, hidden: Any, past_key_values: Any = None) -> Any:
        return past_key_values


class Component(nn.Module):
    """A component of TransformerLens around attention: it looks for an old name, or hands its options on."""

    def __init__(self, original: nn.Module, *, looks_for: str | None):
        super().__init__()
        self._original_component = original
        self.hook_rot_k = nn.Identity()
        self._looks_for = looks_for

    def forward(self, hidden: Any, **options: Any) -> Any:
        found = options.get(self._looks_for) if self._looks_for else self._original_component(hidden, **options)
        return found, self.hook_rot_k(torch.zeros(1, dtype=torch.float32)).dtype


@pytest.mark.parametrize("looks_for", ["past_key_values", "cache_params", None])
def test_a_component_finds_the_cache_under_every_name_and_transformers_under_the_new_one(looks_for: str | None) -> None:
    component, cache = Component(Attention(), looks_for=looks_for), object()
    if looks_for:
        assert component(0, cache=cache)[0] is None
    support_newer_transformers(component, torch.bfloat16)
    assert component(0, cache=cache) == (cache, torch.bfloat16)
    assert component(0, cache=None)[0] is None
    assert component(0)[0] is None


@pytest.mark.parametrize("name", ["past_key_values", "cache_params", "cache"])
def test_transformers_takes_the_cache_under_every_name(name: str) -> None:
    model, cache = nn.Sequential(Attention()), object()
    support_newer_transformers(model, torch.float32)
    assert model[0](0, **{name: cache}) is cache


def test_older_versions_of_transformers_are_left_alone() -> None:
    component, cache = Component(OldAttention(), looks_for="past_key_values"), object()
    support_newer_transformers(component, torch.float32)
    assert component(0, past_key_values=cache) == (cache, torch.float32)
    assert not component._forward_pre_hooks


def test_advice_on_the_names_is_not_shown_but_other_advice_is() -> None:
    support_newer_transformers(Component(Attention(), looks_for=None), torch.float32)
    logger = logging.getLogger("transformers.utils.generic")
    texts = ["`past_key_values`/`cache_params` are deprecated. Use `cache` instead.", "something else"]
    records = [logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None) for text in texts]
    assert [bool(logger.filter(record)) for record in records] == [False, True]
