"""Every family of docs/models.md runs as the page says and equals Hugging Face, or is refused for that reason."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
import transformers

from tests import tiny
from tests.families import FAMILIES
from tests.model_families import DOCS, NOT_WITH_NEWER, measure, page, recorded
from tlcapture.errors import ModelError
from tlcapture.models.loading import from_hugging_face

BOUND = 1e-4
AIM = 60


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_equals_hugging_face_or_is_refused(family: str) -> None:
    outcome = measure(family)
    on_the_page = recorded().get(version("transformer_lens"))
    if on_the_page is not None:
        expected = on_the_page["families"][family]["float32"]
        if on_the_page["versions"]["transformers"] == version("transformers"):
            assert (outcome.engine, outcome.refusal) == (expected["engine"], expected["refusal"])
        elif family != NOT_WITH_NEWER:
            assert outcome.engine == expected["engine"], outcome.refusal
    if outcome.engine is None:
        assert outcome.refusal and "\n" not in outcome.refusal
        return
    assert outcome.hidden is not None and outcome.lens is not None
    assert max(outcome.hidden, outcome.attention or 0, outcome.lens) < BOUND, outcome
    assert outcome.tokens == outcome.n_tokens


BIASED = {"Falcon-H1": "mamba_proj_bias", "Falcon Mamba": "use_bias", "LFM2": "conv_bias"}


@pytest.mark.parametrize("family", BIASED)
def test_biases_that_let_padding_into_a_recurrence_are_refused(family: str) -> None:
    """transformers adds them to padding, too, so that a batch would change what a prompt gives."""
    config = FAMILIES[family]()
    setattr(config, BIASED[family], True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    with pytest.raises(ModelError, match="token by token in a padded batch than in one pass"):
        from_hugging_face(model, tiny.tokenizer(), name="biased", engine="bridge")


def test_the_page_shows_what_was_measured_with_two_versions_of_transformer_lens() -> None:
    found = recorded()
    assert [tl_version.split(".")[0] for tl_version in found] == ["3", "4"]
    assert (DOCS / "models.md").read_text(encoding="utf-8") == page()
    for measured in found.values():
        assert list(measured["families"]) == list(FAMILIES)
        assert sum(each["float32"]["engine"] is not None for each in measured["families"].values()) >= AIM
