"""Views on a tiny model, against Hugging Face and closed forms."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from tests import tiny
from tests.test_parity import random_ids, run_hugging_face
from tlcapture.errors import InputError, NumericalError
from tlcapture.generation.loop import teacher_force
from tlcapture.views import logit_lens
from tlcapture.views.attention import AttentionPatterns, attention_hooks, attention_view
from tlcapture.views.cache import stacked
from tlcapture.views.head_summary import summarised
from tlcapture.views.internals import internals_hooks, internals_view
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.logit_lens import logit_lens_view
from tlcapture.views.residual import ResidualStream, residual_hooks, residual_view
from tlcapture.views.saved_attention import read_attention

NAMES = {"prompt_id": "1", "prompt_set": "set"}


def through_json(value: Any) -> Any:
    return json.loads(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def lens_of(name: str, ids: list[int], **options: Any) -> tuple[Any, Any]:
    model = tiny.model(name)
    cache = teacher_force(model, ids, residual_hooks(model.n_layers, model.hook_names))
    stream = residual_view(cache, model.n_layers)
    return model, logit_lens_view(
        lambda layer: stream.at(layer, "residual_out"), model.n_layers, ids, model.unembed, **options
    )


def test_residual_in_of_a_layer_is_residual_out_of_the_one_before() -> None:
    stream = ResidualStream(torch.randn(7, 4, 5))
    assert stream.n_layers == 3
    for layer in range(2):
        assert stream.at(layer + 1, "residual_in").data_ptr() == stream.at(layer, "residual_out").data_ptr()


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt_neox"])  # the last two have parallel blocks
@pytest.mark.parametrize("points", [("after_attn",), ("residual_in",), ("residual_in", "residual_out")])
def test_kept_layers_and_points_equal_those_of_a_whole_capture(name: str, points: tuple[str, ...]) -> None:
    model, ids = tiny.model(name), [1, 5, 9, 30]
    kept = KeptPoints.of(model.n_layers, (0, 2), points)
    whole = teacher_force(model, ids, residual_hooks(model.n_layers, model.hook_names, attn_out=True))
    hooks = residual_hooks(model.n_layers, model.hook_names, attn_out=True, only=kept)
    stream = residual_view(teacher_force(model, ids, hooks), model.n_layers, attn_out=True, only=kept)
    expected = residual_view(whole, model.n_layers, attn_out=True)
    assert stream.points.shape[0] == len(kept.point_indices)
    for layer in (0, 2):
        for point in (*points, "attn_out"):
            assert torch.equal(stream.at(layer, point), expected.at(layer, point))


def test_a_missing_layer_or_point_is_named() -> None:
    stream = ResidualStream(torch.randn(7, 4, 5))
    with pytest.raises(InputError, match="no layer 3: the model has layers 0 to 2"):
        stream.at(3, "residual_in")
    with pytest.raises(InputError, match="no residual point 'mid'"):
        stream.at(0, "mid")
    with pytest.raises(InputError, match="--capture-attn"):
        stream.at(0, "attn_out")


def test_a_copy_of_some_tokens_has_a_storage_of_its_size() -> None:
    part = ResidualStream(torch.randn(7, 40, 5), torch.randn(3, 40, 5)).tokens(3, 5, torch.float32)
    assert part.points.untyped_storage().nbytes() == part.points.nbytes
    assert part.attn_out is not None
    assert part.attn_out.untyped_storage().nbytes() == part.attn_out.nbytes


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_the_last_lens_layer_is_the_models_own_distribution(name: str) -> None:
    ids = random_ids(15)
    _, lens = lens_of(name, ids, top_k=tiny.VOCABULARY)
    theirs = run_hugging_face(name, ids).logits[0].softmax(dim=-1)
    ours = torch.zeros(len(ids) - 1, tiny.VOCABULARY).scatter(1, lens.top_ids[-1], lens.top_probs[-1])
    assert torch.allclose(ours, theirs[:-1], atol=1e-5)
    for token, actual in enumerate(ids[1:]):
        assert lens.actual_prob[-1, token] == pytest.approx(float(theirs[token, actual]), rel=1e-3)
        assert lens.actual_rank[-1, token] == 1 + int((theirs[token] > theirs[token, actual]).sum())


def test_every_lens_layer_uses_its_own_normalisation_scale() -> None:
    ids = random_ids(9)
    model, lens = lens_of("llama", ids, top_k=5)
    cache = teacher_force(model, ids, ["blocks.1.hook_resid_post"])
    residual = cache["blocks.1.hook_resid_post"][:-1]
    reference = tiny.hf_model("llama")
    with torch.no_grad():
        logits = reference.lm_head(reference.model.norm(residual))
    assert torch.allclose(lens.top_probs[1], logits.softmax(-1).topk(5).values, atol=1e-5)


def test_the_rank_of_a_token_comes_from_its_id() -> None:
    # Two ids whose text is the same replacement character must not be taken for one another.
    ids = [200, 201, 200, 201, 202]
    _, lens = lens_of("llama", ids, top_k=3)
    logits = run_hugging_face("llama", ids).logits[0]
    ranks = [1 + int((logits[t] > logits[t, ids[t + 1]]).sum()) for t in range(4)]
    assert lens.actual_rank[-1].tolist() == ranks


def test_lens_json_has_its_exact_form() -> None:
    ids = random_ids(6)
    model, lens = lens_of("llama", ids, top_k=4)
    tokens = [f"t{i}" for i in range(6)]
    value = through_json(
        lens.to_json(**NAMES, tokens=tokens, n_prompt_tokens=2, token_texts=lambda ids: [f"<{i}>" for i in ids])
    )
    assert {key: value[key] for key in ("n_prompt_tokens", "n_response_tokens", "n_layers", "top_k")} == {
        "n_prompt_tokens": 2,
        "n_response_tokens": 4,
        "n_layers": model.n_layers,
        "top_k": 4,
    }
    assert value["tokens"] == tokens
    assert [prediction["token_idx"] for prediction in value["predictions"]] == [0, 1, 2, 3, 4]
    for prediction in value["predictions"]:
        t = prediction["token_idx"]
        assert prediction["actual_next_token"] == tokens[t + 1]
        assert [row["layer"] for row in prediction["by_layer"]] == list(range(model.n_layers))
        for row in prediction["by_layer"]:
            assert set(row) == {"layer", "top_k", "actual_rank", "actual_prob"}
            probs = [entry["prob"] for entry in row["top_k"]]
            assert probs == sorted(probs, reverse=True)
            assert [entry["token"] for entry in row["top_k"]] == [
                f"<{i}>" for i in lens.top_ids[row["layer"], t].tolist()
            ]


@pytest.mark.parametrize("size", [1, 3, 19, 25, 1000])
def test_the_lens_is_the_same_in_chunks_within_a_layer_and_across_layers(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    ids = random_ids(20)
    model, lens = lens_of("llama", ids)
    monkeypatch.setattr("tlcapture.views.logit_lens.CHUNK", size)
    _, chunked = lens_of("llama", ids)
    assert chunked.top_ids.shape == (model.n_layers, 19, min(50, tiny.VOCABULARY))
    assert torch.equal(lens.top_ids, chunked.top_ids)
    assert torch.equal(lens.actual_rank, chunked.actual_rank)
    assert torch.allclose(lens.actual_prob, chunked.actual_prob, atol=1e-6)


def test_few_tokens_of_many_layers_are_unembedded_together() -> None:
    calls: list[int] = []

    def unembed(residual: torch.Tensor) -> torch.Tensor:
        calls.append(len(residual))
        return residual.clone()

    logit_lens_view(lambda layer: torch.randn(10, 60), 26, [1] * 10, unembed)
    assert calls == [128, 26 * 9 - 128]


def test_the_lens_takes_fewer_rows_at_a_time_where_a_gpu_has_no_memory_for_more() -> None:
    residual, ids = torch.randn(3, 20, 60, generator=torch.Generator().manual_seed(0)), list(range(20))
    calls: list[int] = []

    def unembed(rows: torch.Tensor, most: int = 10) -> torch.Tensor:
        calls.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows.clone()

    found = logit_lens_view(residual.__getitem__, 3, ids, unembed)
    assert calls == [57, 28, 14, 7, 7, 7, 7, 7, 7, 7, 7, 1]
    expected = logit_lens_view(residual.__getitem__, 3, ids, torch.clone)
    assert torch.equal(found.top_ids, expected.top_ids) and torch.equal(found.top_probs, expected.top_probs)
    with pytest.raises(torch.OutOfMemoryError):
        logit_lens_view(residual.__getitem__, 3, ids, lambda rows: unembed(rows, 0))


def test_probabilities_from_logits_of_16_bits_are_those_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes."""
    monkeypatch.setattr(logit_lens, "_PIECE", 3 * 500)
    logits = (8 * torch.randn(10, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    logits[3, 7], logits[4, 7], logits[5, :499] = torch.nan, torch.inf, -torch.inf
    ids = torch.cat([torch.arange(10)[:, None], logits.float().topk(20).indices], dim=1)
    expected = logit_lens._softmax(logits.float(), ids)
    assert torch.allclose(logit_lens._exponentials(logits, ids), expected, rtol=1e-5, equal_nan=True)
    assert logit_lens._exponentials(logits[:0], ids[:0]).shape == (0, 21)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_threads_find_on_a_gpu_what_a_cpu_finds() -> None:
    logits = torch.randn(3 * 401, 30_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    numbers = torch.arange(3.0 * 401).view(3, 401, 1)
    on_gpu = logits.cuda()

    def lens_on(where: torch.Tensor) -> Any:
        def unembed(rows: torch.Tensor) -> torch.Tensor:
            return where[rows[:, 0].long()]

        return logit_lens_view(numbers.__getitem__, 3, [7] * 401, unembed, device=where.device)

    expected = lens_on(logits)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: lens_on(on_gpu), range(8)):
            assert torch.equal(found.actual_rank, expected.actual_rank)
            assert torch.allclose(found.actual_prob, expected.actual_prob, rtol=1e-4)
            assert torch.allclose(found.top_probs, expected.top_probs, rtol=1e-4)


def test_all_threads_use_one_stream_for_the_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stream of its own, each thread would take the memory of a chunk."""
    made, used, device = [], [], torch.device("cuda", 77)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for _ in range(2):
        with logit_lens._on_own_stream(device) as turn:
            used.append(turn)
    assert made == [device] and used[0] is used[1]
    assert used[0].acquire(blocking=False) and not used[1].acquire(blocking=False)


def test_a_single_token_has_no_prediction() -> None:
    _, lens = lens_of("llama", [5])
    assert lens.actual_rank.shape == (3, 0)


def test_attention_rows_reach_up_to_their_token_and_sum_to_one() -> None:
    model, ids = tiny.model("gemma2"), random_ids(30)
    view = attention_view(teacher_force(model, ids, attention_hooks(model.n_layers, model.hook_names)), model.n_layers)
    value = through_json(view.to_json(**NAMES, tokens=["x"] * 30, n_prompt_tokens=10))
    assert (value["n_layers"], value["n_heads"], value["n_response_tokens"]) == (3, 4, 20)
    attentions = run_hugging_face("gemma2", ids).attentions
    for row in value["attention"]:
        t = row["token_idx"]
        assert row["context_size"] == t + 1
        weights = torch.tensor(row["by_layer"])
        assert weights.shape == (3, 4, t + 1)
        assert torch.allclose(weights.sum(-1), torch.ones(3, 4), atol=5e-3)
        for layer in range(3):
            assert torch.allclose(weights[layer], attentions[layer][0, :, t, : t + 1], rtol=1e-3, atol=1e-6)


def test_attention_weights_have_four_digits() -> None:
    view = AttentionPatterns(torch.tensor([[[[1.0, 0.0], [0.123456, 0.876544]]]]), 1, (0,))
    value = through_json(view.to_json(**NAMES, tokens=["a", "b"], n_prompt_tokens=1))
    assert value["attention"][1]["by_layer"] == [[[0.1235, 0.8765]]]


def test_nan_attention_is_an_error() -> None:
    view = AttentionPatterns(torch.full((1, 1, 1, 1), float("nan")), 1, (0,))
    with pytest.raises(NumericalError, match="NaN"):
        view.to_json(**NAMES, tokens=["a"], n_prompt_tokens=1)


@pytest.mark.parametrize(("name", "gated"), [("llama", True), ("gpt2", False)])
def test_internals_hold_a_layer_under_transformerlens_names(name: str, gated: bool) -> None:
    model, ids = tiny.model(name), random_ids(8)
    hooks = internals_hooks(1, model.hook_names)
    internals = internals_view(teacher_force(model, ids, hooks), 1)
    _, theirs = model.tl.run_with_cache(torch.tensor([ids]), device="cpu")
    expected = {"attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern", "hook_attn_out"}
    expected |= {"mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"}
    assert set(internals) == {f"blocks.1.{key}" for key in expected | ({"mlp.hook_pre_linear"} if gated else set())}
    for key, activation in internals.items():
        assert torch.allclose(activation, theirs[key][0], atol=1e-5), key


def test_parallel_blocks_have_no_residual_between_attention_and_mlp() -> None:
    model = tiny.model("gpt_neox")
    assert model.has_parallel_blocks
    assert "blocks.1.hook_resid_mid" not in internals_hooks(1, model.hook_names)


@pytest.mark.parametrize("d_vocab", [40, 64 * 60, 64 * 60 + 17])
def test_the_lens_finds_what_a_sort_finds_in_a_large_vocabulary(d_vocab: int) -> None:
    generator = torch.Generator().manual_seed(d_vocab)
    logits = torch.randn(30, d_vocab, generator=generator)
    ids = torch.randint(0, d_vocab, (31,), generator=generator).tolist()
    lens = logit_lens_view(lambda layer: torch.arange(31.0)[:, None], 1, ids, lambda residual: logits.clone(), top_k=50)
    order = logits.argsort(dim=-1, descending=True)
    top_k = min(50, d_vocab)
    assert lens.top_ids[0].equal(order[:, :top_k])
    assert torch.allclose(lens.top_probs[0], logits.softmax(dim=-1).gather(-1, order[:, :top_k]), rtol=1e-4)
    expected = (order == torch.tensor(ids[1:])[:, None]).nonzero()[:, 1] + 1
    assert lens.actual_rank[0].equal(expected)


def test_tensors_evenly_spaced_in_one_storage_are_stacked_without_a_copy() -> None:
    buffer = torch.randn(5, 3, 40, 8)
    views = [each[1, 4:30] for each in buffer]
    assert stacked(views).equal(buffer[:, 1, 4:30])
    assert stacked(views).data_ptr() == views[0].data_ptr()
    others = [views[0], views[2], views[1]]
    assert stacked(others).equal(torch.stack(others))
    assert stacked([views[0], views[0]]).equal(torch.stack([views[0], views[0]]))
    assert stacked([views[0], torch.randn(26, 8)]).shape == (2, 26, 8)


@pytest.mark.parametrize("engine", [*tiny.ENGINES, pytest.param("plain", marks=tiny.needs_hooked)])
def test_the_lens_does_not_overwrite_logits_that_are_still_used(engine: str) -> None:
    model, held = tiny.model("llama", engine), []
    residual = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    point = model.tl.hook_dict["unembed.hook_out"]
    handle = point.register_forward_hook(lambda module, args, output: held.append(output))
    try:
        logit_lens_view(lambda layer: residual, 1, list(range(5)), model.unembed)
    finally:
        handle.remove()
    expected = model.unembed(residual[:-1])
    assert torch.allclose(held[0].reshape(expected.shape), expected)


def test_a_logit_lens_without_predictions_is_an_error() -> None:
    with pytest.raises(InputError, match="top_k is 0: expected at least 1"):
        logit_lens_view(lambda layer: torch.randn(3, 4), 1, [1, 2, 3], lambda residual: residual, top_k=0)


@pytest.mark.parametrize("n_response", [3, 0])
def test_heads_are_summarised_over_the_response_or_over_the_prompt_without_one(tmp_path: Path, n_response: int) -> None:
    """The first head attends to all keys alike, the second to the query itself."""
    n_prompt = 4
    n_tokens = n_prompt + n_response
    even = torch.ones(n_tokens, n_tokens).tril() / torch.arange(1.0, n_tokens + 1)[:, None]
    view = AttentionPatterns(torch.stack([even, torch.eye(n_tokens)])[None], 2, (1,))
    path = tmp_path / "1_attention.json"
    content = view.to_json(**NAMES, tokens=["x"] * n_tokens, n_prompt_tokens=n_prompt)
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
    found, lengths = summarised(read_attention(path)), np.arange(n_tokens)[n_prompt if n_response else 1 :] + 1
    assert (found.n_queries, found.part) == (len(lengths), "response" if n_response else "prompt")
    first = {"entropy": np.log(lengths), "distance": (lengths - 1) / 2, "first": 1 / lengths, "previous": 1 / lengths}
    for name, values in {**first, "self": 1 / lengths}.items():
        assert np.isnan(found.measures[name][0]).all()
        assert found.measures[name][1] == pytest.approx([values.mean(), float(name == "self")], rel=1e-3, abs=1e-6)


def test_attention_of_layers_without_any_is_an_error_that_names_those_that_have_it() -> None:
    names = {"blocks.1.attn.hook_pattern", "blocks.2.attn.hook_pattern"}
    assert attention_hooks(3, names, [0, 2]) == ["blocks.2.attn.hook_pattern"]
    with pytest.raises(InputError, match="none of them has attention: layers 1, 2 have"):
        attention_hooks(3, names, [0])
    with pytest.raises(InputError, match="the model has no attention"):
        attention_hooks(3, set())
