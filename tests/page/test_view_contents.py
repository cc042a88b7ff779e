"""Matrices and summaries of attention, contributions of layers and internals: the numbers of the files."""

from __future__ import annotations

import base64
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests.cli.conftest import capture, data  # noqa: F401  fixtures
from tests.input import captures
from tests.page.conftest import N_HEADS, N_LAYERS, N_PROMPT, TOKENS, write
from tests.page.test_export import carried
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError, StorageError
from tlcapture.page.contents import Contents
from tlcapture.page.missing import MissingError
from tlcapture.storage.files import read_json, write_tensors

Run = Callable[..., Result]
WHERE = ("exp", "short", "1")


def matrix(found: dict[str, Any], n_tokens: int) -> np.ndarray[Any, Any]:
    """`[query, key]`, NaN for queries without weights."""
    weights, start = np.frombuffer(base64.b64decode(found["weights"]), "<f2"), 0
    whole = np.full((n_tokens, n_tokens), np.nan)
    for query in found["queries"]:
        whole[query] = 0
        whole[query, : query + 1] = weights[start : start + query + 1]
        start += query + 1
    assert start == len(weights)
    return whole


def test_uniform_attention_has_the_summary_of_its_closed_form(page_root: Path) -> None:
    found = Contents(page_root).attention_heads("exp", "odd", "1")
    n_keys = range(N_PROMPT + 1, len(TOKENS) + 1)
    assert (found["n_queries"], found["part"]) == (len(n_keys), "response")
    expected = {
        "entropy": [log(n) for n in n_keys],
        "distance": [(n - 1) / 2 for n in n_keys],
        **{name: [1 / n for n in n_keys] for name in ("first", "previous", "self")},
    }
    for name, values in expected.items():
        rows = found["measures"][name]
        assert np.shape(rows) == (N_LAYERS, N_HEADS)
        np.testing.assert_allclose(rows, np.mean(values), rtol=1e-3)


@pytest.mark.parametrize("form", ["json", "compact"])
def test_a_matrix_has_the_weights_of_a_head_or_their_mean(capture: Run, root: Path, form: str) -> None:  # noqa: F811
    done = capture("--attention", "--format", form, "--no-project", "--attention-layers", "0,2")
    assert done.exit_code == 0, done.output
    assert capture("--attention", "--format", "json", "--replay", "--attention-layers", "0,2").exit_code == 0
    file = read_json(root / "experiments/exp/analysis/per_token/short/1_attention.json")
    assert capture("--attention", "--format", form, "--replay", "--attention-layers", "0,2").exit_code == 0
    contents, n_tokens = Contents(root), len(file["tokens"])
    for layer in (0, 2):
        heads = np.zeros((file["n_heads"], n_tokens, n_tokens))
        for entry in file["attention"]:
            query = entry["token_idx"]
            heads[:, query, : query + 1] = entry["by_layer"][layer]
        for head in range(file["n_heads"]):
            found = matrix(contents.attention_matrix(*WHERE, str(layer), str(head)), n_tokens)
            np.testing.assert_allclose(found, heads[head], rtol=1e-3, atol=1e-6)
        found = matrix(contents.attention_matrix(*WHERE, str(layer), "mean"), n_tokens)
        np.testing.assert_allclose(found, heads.mean(0), rtol=1e-3, atol=1e-6)
    for layer, head, expected in (
        ("1", "0", "layer 1 was not kept"),
        ("0", "99", "no head 99"),
        ("x", "0", "a number"),
    ):
        with pytest.raises(InputError, match=expected):
            contents.attention_matrix(*WHERE, layer, head)
    summary = contents.attention_heads(*WHERE)
    assert summary["measures"]["first"][1] == [None] * file["n_heads"]


def test_queries_that_were_not_kept_are_left_out(capture: Run, root: Path) -> None:  # noqa: F811
    assert capture("--attention", "--tokens", "1:3", "--no-project").exit_code == 0
    contents = Contents(root)
    kept = read_json(root / "experiments/exp/analysis/per_token/short/1_attention.json")["positions"]
    assert contents.attention_matrix(*WHERE, "0", "0")["queries"] == kept and len(kept) == 2
    found = contents.attention_heads(*WHERE)
    assert (found["n_queries"], found["part"]) == (2, "response")


@pytest.fixture
def internals(capture: Run, root: Path) -> Contents:  # noqa: F811
    assert capture("--layer-internals", "1", "--no-project").exit_code == 0
    return Contents(root)


def test_contributions_are_differences_of_the_stored_residual_stream(internals: Contents) -> None:
    capture_file = internals.root / "experiments/exp/inference/raw/residual/short/1.pt"
    saved, found = Capture.open(capture_file), internals.contributions(*WHERE)
    assert (found["layers"], found["tokens"]) == ([0, 1, 2], list(range(len(saved.tokens))))
    for layer in range(3):
        at = [saved.residual(layer, point).double() for point in ("residual_in", "after_attn", "residual_out")]
        for name, expected in (("attn", at[1] - at[0]), ("mlp", at[2] - at[1]), ("stream", at[2])):
            np.testing.assert_allclose(found[name][layer], expected.norm(dim=1).numpy(), rtol=1e-4)


def test_internals_are_the_norms_of_the_hooks_and_the_largest_activations(internals: Contents) -> None:
    file = torch.load(internals.root / "experiments/exp/inference/raw/internals/short/1_L1.pt", weights_only=True)
    assert internals.internals(*WHERE) == {"layers": [1]}
    layer = internals.internals_layer(*WHERE, "1")
    assert {"attn.hook_q", "attn.hook_z", "mlp.hook_post", "hook_mlp_out"} <= set(layer["hooks"])
    assert "attn.hook_pattern" not in layer["hooks"] and layer["router"] is None
    for name, hook in layer["hooks"].items():
        values = file[f"blocks.1.{name}"].double()
        assert hook["shape"] == list(values.shape)
        np.testing.assert_allclose(hook["norms"], values.flatten(1).norm(dim=1).numpy(), rtol=1e-4)
    for token in (0, len(layer["tokens"]) - 1):
        found, post = internals.internals_token(*WHERE, "1", str(token)), file["blocks.1.mlp.hook_post"][token].double()
        assert layer["n_neurons"] == len(post)
        top = post.abs().topk(min(30, len(post)))
        assert [abs(each["post"]) for each in found["neurons"]] == pytest.approx(top.values.tolist(), rel=1e-4)
        for each in found["neurons"]:
            assert each["post"] == pytest.approx(post[each["neuron"]].item(), rel=1e-4)
            assert each["pre"] == pytest.approx(file["blocks.1.mlp.hook_pre"][token, each["neuron"]].item(), rel=1e-4)
        assert found["share"] == pytest.approx((top.values.square().sum() / post.square().sum()).item(), rel=1e-4)
        heads = file["blocks.1.attn.hook_z"][token].double().norm(dim=1)
        assert found["heads"] == pytest.approx(heads.tolist(), rel=1e-4)
        assert found["experts"] is None


def test_experts_are_ordered_by_the_score_of_the_router(internals: Contents) -> None:
    path = internals.root / "experiments/exp/inference/raw/internals/short/1_L1.pt"
    content = torch.load(path, weights_only=True)
    scores = torch.randn(len(content["tokens"]), 5, generator=torch.Generator().manual_seed(0))
    write_tensors(path, {**content, "blocks.1.mlp.hook_router_scores": scores})
    np.testing.assert_allclose(internals.internals_layer(*WHERE, "1")["router"], scores.T.numpy(), rtol=1e-4)
    found = internals.internals_token(*WHERE, "1", "2")["experts"]
    assert [each["expert"] for each in found] == scores[2].argsort(descending=True).tolist()
    shares = scores[2].softmax(0).sort(descending=True).values
    assert [each["share"] for each in found] == pytest.approx(shares.tolist(), rel=1e-4)


def test_what_is_not_stored_names_the_command(internals: Contents, page_root: Path) -> None:
    with pytest.raises(MissingError) as caught:
        internals.internals_layer(*WHERE, "0")
    assert caught.value.command.startswith(
        "tlcapture capture --experiment exp --prompt-set short --layer-internals all --replay"
    )
    with pytest.raises(InputError, match="token 999 is not stored"):
        internals.internals_token(*WHERE, "1", "999")
    with pytest.raises(MissingError):
        Contents(page_root).internals("exp", "odd", "1")


@pytest.mark.parametrize("resource", ["contributions", "internals_layer"])
def test_a_damaged_file_is_named(internals: Contents, resource: str) -> None:
    folder = internals.root / "experiments/exp/inference/raw"
    path = folder / ("residual/short/1.pt" if resource == "contributions" else "internals/short/1_L1.pt")
    whole = path.read_bytes()
    words = [*WHERE, *(["1"] if resource == "internals_layer" else [])]
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=f"{path.name}: cannot be read"):
            getattr(internals, resource)(*words)
    write_tensors(path, {"a": torch.zeros(2)})
    with pytest.raises(StorageError, match=f"{path.name}: .*not a"):
        getattr(internals, resource)(*words)


def test_a_byte_that_changed_in_activations_is_named_by_the_page_and_by_an_export(
    internals: Contents, tlcapture: Run
) -> None:
    path = internals.root / "experiments/exp/inference/raw/residual/short/1.pt"
    points = torch.load(path, weights_only=True)["response"]["activations"][1]["residual_out"]
    content = bytearray(path.read_bytes())
    content[content.index(points[-1].contiguous().view(torch.uint8).numpy().tobytes())] ^= 4
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"1\.pt: .* does not match its checksum"):
        internals.contributions(*WHERE)
    target = internals.root / "page.html"
    done = tlcapture("view", "--experiment", "exp", "--export", target)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"failed: {path}: ") and line.endswith("does not match its checksum")
    found = carried(target.read_text())
    assert "exp/sets/short/2/contributions" in found
    assert "exp/sets/short/1/contributions" not in found


def test_internals_of_different_numbers_of_tokens_are_refused(internals: Contents) -> None:
    path = internals.root / "experiments/exp/inference/raw/internals/short/1_L1.pt"
    content = torch.load(path, weights_only=True)
    for change in ({"blocks.1.mlp.hook_post": torch.zeros(2, 8)}, {"positions": [0, 1]}):
        write_tensors(path, {**content, **change})
        with pytest.raises(StorageError, match="have different numbers of tokens"):
            internals.internals_layer(*WHERE, "1")


def test_internals_of_other_tokens_are_refused(internals: Contents) -> None:
    folder = internals.root / "experiments/exp/inference/raw/internals/short"
    (folder / "1_L1.pt").write_bytes((folder / "2_L1.pt").read_bytes())
    with pytest.raises(StorageError, match="its tokens differ from the capture's"):
        internals.internals_layer(*WHERE, "1")


def test_points_that_were_not_kept_are_null(capture: Run, root: Path) -> None:  # noqa: F811
    done = capture("--layers", "1,2", "--points", "after_attn,residual_out", "--no-project")
    assert done.exit_code == 0, done.output
    found = Contents(root).contributions(*WHERE)
    assert (found["layers"], found["attn"]) == ([1, 2], [None, None])
    assert None not in found["mlp"] and None not in found["stream"]


def test_files_of_another_prompt_are_not_shown_as_this_one_s(page_root: Path) -> None:
    folder = page_root / "experiments" / "exp"
    for kind in ("attention", "logit_lens"):
        path = folder / "analysis" / "per_token" / "odd" / f"1_{kind}.json"
        write(path, {**read_json(path), "prompt_id": "2"})
    raw = folder / "inference" / "raw" / "residual" / "odd" / "1.pt"
    raw.parent.mkdir(parents=True, exist_ok=True)
    other = captures.content()
    other["metadata"]["prompt_id"] = "2"
    torch.save(other, raw)
    contents = Contents(page_root)
    for show in (contents.attention, contents.lens, contents.contributions):
        with pytest.raises(StorageError, match="names prompt odd/2: it was moved or renamed"):
            show("exp", "odd", "1")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"prompt": torch.zeros(2), "response": []}, [1], None])
def test_internals_beside_a_file_that_is_no_capture_are_refused(internals: Contents, content: Any) -> None:
    write_tensors(internals.root / "experiments/exp/inference/raw/residual/short/1.pt", content)
    with pytest.raises(StorageError, match=r"1_L1\.pt: its tokens differ from the capture's"):
        internals.internals_layer(*WHERE, "1")
    with pytest.raises(StorageError, match=r"1\.pt: "):
        internals.contributions(*WHERE)


@pytest.mark.parametrize("change", [{"metadata": [1]}, {"positions": ["a"]}, {"positions": 3}, {"metadata": "x"}])
def test_internals_of_another_form_are_refused(internals: Contents, change: dict[str, Any]) -> None:
    path = internals.root / "experiments/exp/inference/raw/internals/short/1_L1.pt"
    write_tensors(path, {**torch.load(path, weights_only=True), **change})
    with pytest.raises(StorageError, match=r"1_L1\.pt: not a valid internals file"):
        internals.internals_layer(*WHERE, "1")
    with pytest.raises(StorageError, match=r"1_L1\.pt: not a valid internals file"):
        internals.internals_token(*WHERE, "1", "0")
