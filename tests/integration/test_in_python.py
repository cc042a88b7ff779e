"""The Python API on the embedded model: experiments, captures and caches."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import tlcapture
from tests import tiny
from tlcapture import Experiment
from tlcapture.errors import InputError
from tlcapture.explore.doubts import _told
from tlcapture.names import Trait
from tlcapture.traits.vector_files import VectorFiles


def test_an_experiment_lists_its_prompt_sets_traits_and_captures(exp: Experiment) -> None:
    assert exp.prompt_sets == ["single_trait"]
    assert exp.traits == ["behavioral/refusal", "style/formality"]
    assert exp.captures("single_trait").keys() == ["1", "2"]
    assert "single_trait: 2" in repr(exp)
    with pytest.raises(KeyError, match="has captures 1, 2"):
        exp.captures("single_trait")[9]
    with pytest.raises(InputError, match=r"no experiment 'nix'.*existing experiments: exp"):
        Experiment("nix", exp.layout.root)


def test_a_capture_is_opened_on_first_use(exp: Experiment) -> None:
    cap = exp.captures("single_trait")[1]
    assert "capture" not in cap.__dict__
    assert len(cap.tokens) == cap.residual(5, "after_attn").shape[0]
    assert cap.residual(5, "residual_out", "response").shape[0] == len(cap.response.tokens)
    assert "single_trait/1" in repr(cap)


@pytest.mark.filterwarnings("ignore:.*by default")
def test_a_projection_equals_that_of_the_command(exp: Experiment) -> None:
    cap = exp.captures("single_trait")[2]
    projection = cap.project("style/formality")
    path = exp.layout.projection(projection.vector.trait, "residual", "single_trait", "2")
    written = json.loads(path.read_text())
    layer = written["metadata"]["vector_source"]["layer"]
    expected = [token[layer][2] for part in ("prompt", "response") for token in written["projections"][part]]
    assert projection.trajectory.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert projection.dynamics.persistence == written["dynamics"]["persistence"]


def test_the_cache_holds_the_stored_activations(exp: Experiment) -> None:
    cap = exp.captures("single_trait")[1]
    n_tokens = len(cap.tokens)
    assert torch.equal(cap.cache["resid_post", 5], cap.residual(5))
    assert torch.equal(cap.cache["attn_out", 5], cap.residual(5, "attn_out"))
    stack, labels = cap.cache.accumulated_resid(return_labels=True)
    assert stack.shape == (31, n_tokens, 576)
    assert labels[-1] == "final_post"


def test_cache_methods_that_need_the_model_agree_with_a_live_run(exp: Experiment) -> None:
    cap = exp.captures("single_trait")[1]
    tokens = torch.tensor([cap.token_ids])
    _, live = exp.model.tl.run_with_cache(tokens)
    theirs = live.accumulated_resid(apply_ln=True)[:, 0]
    assert torch.allclose(cap.cache.accumulated_resid(apply_ln=True), theirs, atol=1e-3)


def test_logit_attributions_of_the_final_residual_are_the_logits(exp: Experiment) -> None:
    cap = exp.captures("single_trait")[1]
    ids = torch.tensor(cap.token_ids)
    stack = cap.cache.accumulated_resid()[-1:]
    ours = cap.cache.logit_attrs(stack, ids, has_batch_dim=False)[0]
    with torch.no_grad():
        logits = exp.model.tl(ids[None])[0]
    assert torch.allclose(ours, logits.gather(-1, ids[:, None])[:, 0], atol=1e-2)


def test_the_cache_requires_the_captured_model(exp: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    cap = exp.captures("single_trait")[1]
    assert cap.cache["resid_post", 5].shape[1] == 576  # needs no model
    monkeypatch.setattr(exp.model, "fingerprint", "another")
    with pytest.raises(InputError, match="was captured from 'smollm2'"):
        cap.cache.accumulated_resid(apply_ln=True)


def test_a_projection_warns_about_default_layers_and_other_models(exp: Experiment) -> None:
    cap = exp.captures("single_trait")[1]
    _told.clear()
    with pytest.warns(UserWarning, match="layer 16 by default"):
        cap.project("style/formality")
    assert cap.project("style/formality", layer=np.int64(3)).vector.layer == 3
    with pytest.raises(InputError, match="neither a number nor 'auto'"):
        cap.project("style/formality", layer="3")
    folder = VectorFiles(exp.layout, Trait.parse("style/formality"))
    metadata = folder.metadata("residual")
    folder.write_metadata("residual", {**metadata, "extraction_model": "elsewhere", "model_fingerprint": "0"})
    try:
        with pytest.warns(UserWarning, match="extracted from model 'elsewhere'"):
            cap.project("style/formality", layer=3)
    finally:
        folder.write_metadata("residual", metadata)


def test_an_unknown_part_is_refused(exp: Experiment) -> None:
    with pytest.raises(InputError, match="no part 'prompts'"):
        exp.captures("single_trait")[1].residual(0, "residual_out", "prompts")


def test_capture_yields_one_capture_per_text(smollm2: Any) -> None:
    texts = ["Name a colour.", "Name a fruit."]
    found = {cap.prompt_id: cap for cap in tlcapture.capture(smollm2, texts, max_new_tokens=5, temperature=0)}
    assert set(found) == {"1", "2"}
    for cap in found.values():
        assert 0 < len(cap.response.tokens) <= 5
        assert cap.residual(29).shape == (len(cap.tokens), 576)


@tiny.needs_hooked
def test_capture_accepts_a_hooked_transformer(smollm2: Any) -> None:
    (ours,), (own,) = (
        tlcapture.capture(model, "Name a colour.", max_new_tokens=5, temperature=0) for model in (smollm2, smollm2.tl)
    )
    assert own.response.token_ids == ours.response.token_ids
