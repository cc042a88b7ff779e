"""Caches that grow in place hold what those of transformers hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests import tiny
from tlcapture.models.fast.growing_cache import GrowingLayer, grow_in_place

CHANGES = {
    "rows": lambda cache: cache.reorder_cache(torch.tensor([1, 0, 0])),
    "last row": lambda cache: cache.reorder_cache(torch.tensor([len(cache.layers[0].keys) - 1])),
    "crop": lambda cache: cache.crop(-3),
    "copy": copy.deepcopy,
}


def states(seed: int, n_rows: int, n_positions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n_rows, 2, n_positions, 4, generator=generator).unbind()


def cache(*, grows: bool) -> Any:
    found = DynamicCache()
    found.update(*states(0, 3, 5), layer_idx=0)
    if grows:
        grow_in_place(found)
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_a_cache_of_transformers_holds(change: str) -> None:
    both = [cache(grows=False), cache(grows=True)]
    assert type(both[1].layers[0]) is GrowingLayer
    for seed in range(1, 90):  # more than there is room for at first
        if seed in (20, 21, 80):
            both = [CHANGES[change](each) or each for each in both]
        n_rows = len(both[0].layers[0].keys)
        expected, found = (each.update(*states(seed, n_rows, 1 + seed % 3), layer_idx=0) for each in both)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert both[0].get_seq_length() == both[1].get_seq_length()


def test_earlier_positions_are_copied_seldom() -> None:
    found = cache(grows=True)
    buffers = set()
    for seed in range(1, 200):
        keys, values = found.update(*states(seed, 3, 1), layer_idx=0)
        buffers |= {keys.data_ptr(), values.data_ptr()}
    assert len(buffers) <= 8, "there was room for a quarter more"


def test_a_copy_and_what_was_returned_stay_as_they_were() -> None:
    found = cache(grows=True)
    keys, _ = found.update(*states(1, 3, 1), layer_idx=0)
    copied, seen = copy.deepcopy(found), keys.clone()
    found.update(*states(2, 3, 1), layer_idx=0)
    mine, _ = copied.update(*states(3, 3, 1), layer_idx=0)
    assert torch.equal(keys, seen)
    assert torch.equal(mine[..., -1, :], states(3, 3, 1)[0][..., 0, :])
    assert torch.equal(found.layers[0].keys[..., -1, :], states(2, 3, 1)[0][..., 0, :])


def test_gradients_flow_as_in_transformers() -> None:
    new, value = (each.requires_grad_() for each in states(1, 3, 1))
    keys, _ = cache(grows=True).update(new, value, layer_idx=0)
    keys.sum().backward()
    assert new.grad is not None and new.grad.eq(1).all()


def test_windows_and_other_caches_stay_as_they_are() -> None:
    config = tiny.hf_model("gemma2").config
    windows = DynamicCache(config=config)
    grow_in_place(windows)
    assert {type(each) for each in windows.layers} == {DynamicSlidingWindowLayer, GrowingLayer}
    grow_in_place(None)
    mine = type("Mine", (DynamicCache,), {})(config=config)
    grow_in_place(mine)
    assert DynamicLayer in {type(each) for each in mine.layers}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_engine_bridge_uses_it(name: str) -> None:
    model = tiny.model(name, "bridge")
    tokens = torch.arange(4, 10).unsqueeze(0)
    state = model.start(1)
    for each in tokens.split(1, dim=1):
        model.step(each, torch.ones_like(each), state, set(), want_logits=False)
    assert GrowingLayer in {type(each) for each in state.past.layers}
