"""The memory layout of weights changes no values, shapes or outputs."""

from __future__ import annotations

import copy

import einops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.test_parity import random_ids
from tlcapture.models.engines.weight_layout import laid_out_on, lay_out, memory_order

ARCHITECTURES = ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2"]

pytestmark = tiny.needs_hooked


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_equal_those_of_row_major_weights_bit_for_bit(name: str) -> None:
    laid_out = tiny.model(name).tl
    row_major = copy.deepcopy(laid_out)
    for parameter in row_major.parameters():
        parameter.data = parameter.data.contiguous()
    tokens = torch.tensor([random_ids(20)])
    ours, ours_cache = laid_out.run_with_cache(tokens)
    theirs, theirs_cache = row_major.run_with_cache(tokens)
    assert torch.equal(ours, theirs)
    for key in theirs_cache:
        assert torch.equal(ours_cache[key], theirs_cache[key]), key


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_linear_layers_do_not_copy_their_weights(name: str) -> None:
    model = tiny.model(name).tl
    for block in model.blocks:
        attention = block.attn
        for weight in (attention.W_Q, attention._W_K, attention._W_V):
            needed = einops.rearrange(weight, "head d_model d_head -> (head d_head) d_model")
            assert needed.data_ptr() == weight.data_ptr()
        needed = einops.rearrange(attention.W_O, "head d_head d_model -> d_model (head d_head)").contiguous()
        assert needed.data_ptr() == attention.W_O.data_ptr()
        for weight in (block.mlp.W_in, block.mlp.W_gate, block.mlp.W_out):
            assert weight.T.contiguous().data_ptr() == weight.data_ptr()
    assert model.unembed.W_U.T.contiguous().data_ptr() == model.unembed.W_U.data_ptr()


@given(st.permutations(range(3)))
def test_every_memory_order_keeps_values_and_shape(order: list[int]) -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    laid_out = lay_out(weight, tuple(order))
    assert torch.equal(laid_out, weight)
    assert laid_out.permute(*order).is_contiguous()


def test_weights_that_are_not_transposed_stay_row_major() -> None:
    weight = torch.zeros(3, 4)
    assert memory_order("blocks.0.mlp.W_in", weight, gated_mlp=False) == (0, 1)
    assert memory_order("blocks.0.mlp.W_in", weight, gated_mlp=True) == (1, 0)
    assert memory_order("embed.W_E", weight, gated_mlp=True) == (0, 1)


def test_tied_weights_share_their_memory_also_where_they_are_copied() -> None:
    embedding = torch.randn(6, 4)
    weights = {"embed.W_E": embedding, "unembed.W_U": embedding.T, "blocks.0.mlp.W_in": torch.randn(4, 6)}
    copied = laid_out_on("cpu", torch.bfloat16, weights, gated_mlp=True)
    assert copied["unembed.W_U"].data_ptr() == copied["embed.W_E"].data_ptr() != embedding.data_ptr()
    for name, weight in weights.items():
        assert torch.equal(copied[name], weight.bfloat16()), name
        assert copied[name].permute(memory_order(name, weight, gated_mlp=True)).is_contiguous()


@pytest.mark.parametrize(("name", "n_tables"), [("llama", 1), ("gemma3", 2)])
def test_layers_share_equal_rotary_tables(name: str, n_tables: int) -> None:
    model = tiny.model(name).tl
    assert len({block.attn.rotary_sin.data_ptr() for block in model.blocks}) == n_tables
