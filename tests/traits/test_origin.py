"""Errors and notes about vectors whose origin differs from that of a capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlcapture.errors import VectorError
from tlcapture.names import Trait
from tlcapture.traits.origin import check_origin, described_origin, origin_notes
from tlcapture.traits.vectors import TraitVector

EXTRACTED = {
    "extraction_model": "org/model",
    "component": "residual",
    "num_layers": 3,
    "hidden_dim": 8,
    "hook": "blocks.{L}.hook_resid_post",
    "position": "response_mean",
    "engine": "hooked",
    "dtype": "float32",
    "weight_processing": "none",
    "model_fingerprint": "0123456789abcdef",
    "model_revision": "aaaa",
    "chat_template": True,
    "bos": {"count": 1, "by": "chat template"},
    "tlcapture_version": "1.0",
}
CAPTURED = {
    "inference_model": "org/model",
    "n_layers": 3,
    "d_model": 8,
    "engine": "hooked",
    "dtype": "float32",
    "weight_processing": "none",
    "model_fingerprint": "0123456789abcdef",
    "model_revision": "aaaa",
    "chat_template": True,
    "bos": {"count": 1, "by": "chat template"},
}


def vector(component: str = "residual", **changes: Any) -> TraitVector:
    origin = {key: value for key, value in (EXTRACTED | changes).items() if value is not ...}
    return TraitVector(Trait.parse("tone/loud"), component, "probe", 1, "exp", torch.ones(8), origin)


def notes(found: TraitVector, *, intended: bool = False, **changes: Any) -> list[str]:
    return origin_notes(found, {**CAPTURED, **changes}, other_model_intended=intended)


def test_a_vector_of_the_captured_model_has_no_notes() -> None:
    check_origin(vector(), CAPTURED)
    assert notes(vector()) == []


@pytest.mark.parametrize(
    ("found", "captured", "said"),
    [
        (vector("attn_out"), {}, "is recorded as a vector of residual, not of attn_out: extract it again"),
        (
            vector(hook="blocks.{L}.hook_resid_pre"),
            {},
            r"was read out at blocks\.\{L\}\.hook_resid_pre, but blocks\.\{L\}\.hook_resid_post is projected",
        ),
        (vector(hook="ln_final.hook_normalized"), {}, r"was read out at ln_final\.hook_normalized"),
        (vector(weight_processing="fold_ln"), {}, "vector .* has weight_processing 'fold_ln'"),
        (vector(), {"weight_processing": "center_writing_weights"}, "the capture has weight_processing 'center"),
        (vector(num_layers=4), {}, "from a model with 4 layers, the capture from one with 3, although both .* 'org"),
    ],
)
def test_a_vector_that_cannot_match_is_an_error_naming_both_sides(found: TraitVector, captured: Any, said: str) -> None:
    with pytest.raises(VectorError, match=said) as caught:
        check_origin(found, {**CAPTURED, **captured})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hook", ["blocks.L.hook_resid_post", "blocks.{layer}.hook_resid_post", ...])
def test_hooks_are_compared_however_the_layer_is_written(hook: Any) -> None:
    check_origin(vector(hook=hook), CAPTURED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chat_template": False}, "the vector was extracted with a chat template, the capture made without a chat"),
        (
            {"bos": {"count": 2, "by": "tlcapture"}},
            "the vector's examples begin with 1 BOS, the capture's prompt with 2",
        ),
        (
            {"engine": "bridge", "dtype": "bfloat16"},
            "the vector was extracted on hooked in float32, the capture made on bridge in bfloat16: they differ by",
        ),
        (
            {"model_fingerprint": "f" * 16, "model_revision": "bbbb"},
            "whose weights differ although the name is the same (revision aaaa and bbbb)",
        ),
        (
            {"model_fingerprint": "f" * 16, "inference_model": "other"},
            "from model 'org/model', the capture is from 'other'",
        ),
        ({"model_fingerprint": None, "model_revision": "bbbb"}, "whose weights differ although the name is the same"),
    ],
)
def test_each_difference_is_a_note_with_both_values(changes: Any, said: str) -> None:
    (note,) = notes(vector(), **changes)
    assert said in note
    assert "\n" not in note


def test_another_model_that_is_intended_has_no_note_but_another_chat_template_does() -> None:
    other = {"inference_model": "other", "model_fingerprint": "f" * 16, "dtype": "bfloat16", "n_layers": 5}
    check_origin(vector(), {**CAPTURED, **other})
    assert notes(vector(), intended=True, **other) == []
    assert len(notes(vector(), intended=True, chat_template=False, **other)) == 1


def test_files_of_earlier_versions_are_compared_by_the_fields_they_record() -> None:
    old = vector(model_revision=..., chat_template=..., bos=..., hook=..., weight_processing=..., num_layers=...)
    check_origin(old, CAPTURED)
    assert notes(old) == []
    for key in ("model_revision", "chat_template", "bos", "engine", "weight_processing"):
        captured = {name: value for name, value in CAPTURED.items() if name != key}
        check_origin(vector(), captured)
        assert origin_notes(vector(), captured, other_model_intended=False) == []


def test_an_origin_is_described_on_one_line() -> None:
    assert described_origin(vector().metadata) == (
        "org/model (revision aaaa, weights 01234567), on hooked in float32, blocks.{L}.hook_resid_post, "
        "response_mean, chat template, 1 BOS, tlcapture 1.0"
    )
    assert described_origin({"extraction_model": "m"}) == "m"
    assert described_origin({}) == "unknown origin: no metadata.json"
