"""`--format compact`: the numbers of JSON to the stated rounding, read by everything that reads JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file

from tests import tiny
from tlcapture.errors import InputError
from tlcapture.explore.experiment import Experiment
from tlcapture.generation.recording import pattern_spools
from tlcapture.page.contents import Contents
from tlcapture.storage.compact import compact_files
from tlcapture.storage.files import read_json

Run = Callable[..., Result]
GREEDY = ("--temperature", 0)
VIEWS = (*GREEDY, "--attention", "--logit-lens")
ENTRIES = {"attention": "attention", "logit_lens": "predictions"}


def head_of(path: Path) -> dict[str, Any]:
    """The content of a compact file's head, by another reader."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["content"])


def both(capture: Run, analysis: Path, *words: object) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Attention and lens of prompt 1 as JSON, then the same capture in the compact form."""
    assert capture(*VIEWS, "--format", "json", *words).exit_code == 0
    found = [read_json(analysis / f"1_{name}.json") for name in ENTRIES]
    done = capture(*VIEWS, "--format", "compact", *words)
    assert done.exit_code == 0, done.output
    return found[0], found[1], analysis


@pytest.mark.parametrize("words", [(), ("--tokens", "1:4"), ("--attention-layers", "0,2", "--lens-layers", "2")])
def test_a_layer_is_the_lower_triangle_in_16_bits(capture: Run, analysis: Path, words: tuple[object, ...]) -> None:
    attention, _, _ = both(capture, analysis, *words)
    path = analysis / "1_attention.safetensors"
    assert head_of(path) == {key: value for key, value in attention.items() if key != "attention"}
    tensors = load_file(path)
    present = [layer for layer, at in enumerate(attention["attention"][0]["by_layer"]) if at is not None]
    assert sorted(tensors) == [f"layer.{layer}" for layer in present]
    for layer in present:
        weights, start = tensors[f"layer.{layer}"], 0
        assert weights.dtype == np.float16
        for entry in attention["attention"]:
            stop = start + entry["context_size"]
            rounded = np.float16(np.array(entry["by_layer"][layer]).T)
            np.testing.assert_allclose(weights[start:stop], rounded, rtol=1e-3, atol=6e-8)
            start = stop
        assert start == len(weights)


@pytest.mark.parametrize("words", [(), ("--tokens", "1:4"), ("--lens-layers", "0,2"), ("--lens-top", 7)])
def test_the_lens_has_the_numbers_of_json(capture: Run, analysis: Path, words: tuple[object, ...]) -> None:
    _, lens, _ = both(capture, analysis, *words)
    path = analysis / "1_logit_lens.safetensors"
    assert head_of(path) == {key: value for key, value in lens.items() if key != "predictions"}
    tensors, tokenizer = load_file(path), tiny.tokenizer()
    for row, entry in enumerate(lens["predictions"]):
        for column, cell in enumerate(entry["by_layer"]):
            ids = tensors["top_ids"][row, column].tolist()
            assert [tokenizer.decode([number]) for number in ids] == [top["token"] for top in cell["top_k"]]
            assert tensors["top_probs"][row, column].tolist() == pytest.approx([top["prob"] for top in cell["top_k"]])
            assert tensors["actual_rank"][row, column] == cell["actual_rank"]
            assert tensors["actual_prob"][row, column] == cell["actual_prob"]


@pytest.mark.parametrize("words", [(), ("--tokens", "1:4"), ("--attention-layers", "1", "--lens-layers", "0,2")])
def test_page_and_python_read_both_forms(capture: Run, data: Path, words: tuple[object, ...]) -> None:
    seen: dict[str, Any] = {}
    for form in ("json", "compact"):
        assert capture(*VIEWS, "--format", form, *words).exit_code == 0
        contents, where = Contents(data), ("exp", "short", "1")
        cap = Experiment("exp", data).captures("short")["1"]
        table = cap.logit_lens()
        seen[form] = {
            "set": contents.prompt_set("exp", "short"),
            "lens": contents.lens(*where),
            "lens tokens": [contents.lens_token(*where, str(n)) for n in contents.tokens_of("lens", *where)],
            "head": contents.attention(*where),
            "table": (
                table.top_tokens,
                table.top_probs.tolist(),
                table.actual_rank.tolist(),
                table.actual_prob.tolist(),
            ),
            "numbers": list(table.layer_numbers),
        }
        weights = [
            contents.attention_token(*where, str(n))["by_layer"] for n in contents.tokens_of("attention", *where)
        ]
        seen[f"{form} weights"] = weights
        seen[f"{form} heads"] = cap.attention(1).patterns
        assert cap.attention(1).source.endswith("json" if form == "json" else "safetensors")
    assert seen["json"] == seen["compact"]
    for one, other in zip(seen["json weights"], seen["compact weights"], strict=True):
        for layer, weights in enumerate(one):
            assert (weights is None) == (other[layer] is None)
            if weights is not None:
                np.testing.assert_allclose(other[layer], weights, rtol=1e-3, atol=6e-8)
    np.testing.assert_allclose(seen["json heads"], seen["compact heads"], rtol=1e-3, atol=6e-8)


def test_what_json_would_make_too_large_goes_compact_and_is_said(
    capture: Run, analysis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_files, "MOST_JSON", 70_000)
    said = capture(*VIEWS)
    names = {path.name for path in analysis.iterdir()}
    largest = max(len(read_json(path)["tokens"]) for path in analysis.glob("*_attention.json"))
    for path in analysis.glob("*_attention.safetensors"):
        assert len(head_of(path)["tokens"]) > largest
    assert any(name.endswith("_attention.safetensors") for name in names)
    assert any(name.endswith("_attention.json") for name in names)
    assert said.stderr.count("were written in the compact form") == 1
    assert "compact form" not in capture(*VIEWS, "--format", "json").stderr
    assert not list(analysis.glob("*.safetensors")), "only one form exists"
    assert "compact form" not in capture(*VIEWS, "--format", "compact").stderr
    assert not list(analysis.glob("*.json"))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chunk", [5, 256])
def test_patterns_on_disk_are_those_in_memory(
    capture: Run, analysis: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, chunk: int
) -> None:
    """Prompts of several lengths in one batch, whose weights go through files in chunks; internals read them too."""
    words = (*VIEWS, "--format", "compact", "--layer-internals", 1, "--batch-size", batch_size)
    assert capture(*words).exit_code == 0
    expected = {path.name: load_file(path) for path in analysis.glob("*_attention.safetensors")}
    internals = analysis.parents[2] / "inference" / "raw" / "internals" / "short"
    patterns = {path.name: torch.load(path)["blocks.1.attn.hook_pattern"] for path in internals.glob("*.pt")}
    monkeypatch.setattr("tlcapture.commands.prompt_files.view_files.MOST_JSON", 0)
    monkeypatch.setattr(pattern_spools, "CHUNK", chunk)
    used: list[int] = []
    take = pattern_spools.SpooledPatterns.take
    monkeypatch.setattr(pattern_spools.SpooledPatterns, "take", lambda self, *of: used.append(of[0]) or take(self, *of))
    assert capture(*words).exit_code == 0
    assert used, "the patterns were in memory"
    for name, tensors in expected.items():
        found = load_file(analysis / name)
        assert {key: value.tobytes() for key, value in found.items()} == {
            key: value.tobytes() for key, value in tensors.items()
        }
    for path in internals.glob("*.pt"):
        assert torch.equal(torch.load(path)["blocks.1.attn.hook_pattern"], patterns[path.name])
    used.clear()
    assert capture("--replay", "--attention", "--format", "compact", "--batch-size", batch_size).exit_code == 0
    assert used
    for name, tensors in expected.items():
        for key, found in load_file(analysis / name).items():
            np.testing.assert_allclose(found, tensors[key], rtol=2e-3, atol=1e-6)


def test_skip_existing_takes_either_form_and_makes_what_it_lacks(capture: Run, analysis: Path) -> None:
    capture(*VIEWS, "--format", "compact", "--attention-layers", "1", "--lens-top", 5)
    before = {path: path.stat().st_mtime_ns for path in analysis.iterdir()}
    keep = ("--attention-layers", "1", "--lens-top", 5, "--skip-existing")
    assert capture(*VIEWS, *keep).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in analysis.iterdir()} == before
    assert capture(*VIEWS, "--skip-existing").exit_code == 0
    assert sorted(path.name for path in analysis.glob("1_*")) == ["1_attention.json", "1_logit_lens.safetensors"]
    assert capture(*VIEWS, "--skip-existing", "--lens-top", 9, "--format", "json").exit_code == 0
    assert read_json(analysis / "1_logit_lens.json")["top_k"] == 9


def test_a_damaged_compact_file_is_named_and_kept_unless_told(capture: Run, analysis: Path, data: Path) -> None:
    capture(*VIEWS, "--format", "compact")
    path = analysis / "1_attention.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", b"\xff" * 8 + whole[8:], whole.replace(b"layer.1", b"layer.7")):
        path.write_bytes(damaged)
        refused = capture(*VIEWS)
        assert refused.exit_code == 1, damaged[:10]
        assert str(path) in refused.stderr and "--overwrite" in refused.stderr
        assert path.read_bytes() == damaged
    assert capture(*VIEWS, "--overwrite", "--format", "compact").exit_code == 0
    assert load_file(path)


def test_parts_are_refused_where_nothing_is_written_of_them(capture: Run) -> None:
    for words, said in (
        (("--attention-layers", "1"), "error: --attention-layers keeps a part of what --attention writes: add"),
        (("--lens-top", "5"), "error: --lens-top keeps a part of what --logit-lens writes: add --logit-lens"),
        (("--attention", "--attention-layers", "1,7"), "--attention-layers 7: the model has layers 0 to 2"),
    ):
        done = capture(*words)
        assert done.exit_code == 2, done.output
        assert said in done.stderr
        assert "loading" not in done.output


def test_a_layer_that_was_not_kept_is_said(capture: Run, analysis: Path) -> None:
    from tlcapture.views.saved_attention import read_attention

    for form, ending in (("json", "json"), ("compact", "safetensors")):
        capture(*VIEWS, "--format", form, "--attention-layers", "0,2")
        with pytest.raises(InputError, match="layer 1 was not kept: attention was kept at layers 0, 2"):
            read_attention(analysis / f"1_attention.{ending}").heads(1)
