"""A checkpoint's scale of the logits is part of what the logit lens and token directions compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tlcapture.explore.live.live_capture import capture
from tlcapture.generation.loop import teacher_force
from tlcapture.models.loading import from_hugging_face
from tlcapture.views.hooks import hook
from tlcapture.views.logit_lens import logit_lens_view

IDS = [0, *range(40, 60)]
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SCALED: dict[str, Callable[[], Any]] = {
    "granite": lambda: transformers.GraniteConfig(**tiny._GROUPED, logits_scaling=3.0, residual_multiplier=0.7),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**tiny._GROUPED, logits_scaling=3.0, **_MOE),
    "cohere": lambda: transformers.CohereConfig(**tiny._GROUPED, logit_scale=0.3),
    "cohere2": lambda: transformers.Cohere2Config(**tiny._GROUPED, logit_scale=0.3),
}


def hf_model(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SCALED[name](), attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


@pytest.mark.parametrize("name", list(SCALED))
def test_the_lens_of_the_last_layer_is_the_distribution_of_hugging_face(name: str) -> None:
    source = hf_model(name)
    with torch.no_grad():
        probs = source(torch.tensor([IDS])).logits[0].softmax(dim=-1)
    model = from_hugging_face(source, tiny.tokenizer(), name="tiny", engine="bridge")
    last = hook("residual_out", model.n_layers - 1)
    residual = teacher_force(model, IDS, [last])[last]
    lens = logit_lens_view(lambda layer: residual, 1, IDS, model.unembed)
    theirs = probs[:-1].topk(lens.top_probs.shape[-1])
    torch.testing.assert_close(lens.top_probs[0], theirs.values, rtol=1e-3, atol=1e-6)
    actual = probs[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])]
    torch.testing.assert_close(lens.actual_prob[0], actual, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", list(SCALED))
def test_the_direction_of_a_token_gives_its_logit(name: str) -> None:
    source = hf_model(name)
    model = from_hugging_face(source, tiny.tokenizer(), name="tiny", engine="bridge")
    (cap,) = capture(model, ["Hi there"], max_new_tokens=3, temperature=0, save_dtype="float32")
    ids = torch.tensor(cap.token_ids)
    with torch.no_grad():
        logits = source(ids[None]).logits[0]
    final = cap.cache.accumulated_resid()[-1:]
    found = cap.cache.logit_attrs(final, ids, has_batch_dim=False)[0]
    torch.testing.assert_close(found, logits.gather(-1, ids[:, None])[:, 0], rtol=1e-3, atol=1e-3)
