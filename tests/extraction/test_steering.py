"""Steering on tiny models: the addition itself, and both scores against Hugging Face."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tlcapture.errors import NumericalError
from tlcapture.extraction.monitoring import RANDOM_VECTORS, monitoring
from tlcapture.extraction.steering import RANDOM_VECTORS as STEERED_VECTORS
from tlcapture.extraction.steering import Addition, SteeringScore, SteeringScorer
from tlcapture.generation.interventions.intervention import Add, applied
from tlcapture.generation.loop import generate
from tlcapture.prompts.tokenization import tokenize
from tlcapture.traits.statistics.chance import RandomDirections

QUESTIONS = ["how are you?", "what is it", "why should anybody care about that?"]
COMPLETIONS = [("fine", "bad day"), ("a thing of beauty", "junk"), ("yes", "no")]


def isotropic(d_model: int, n: int = STEERED_VECTORS) -> torch.Tensor:
    return RandomDirections(None, 1, d_model).vectors(n, 0)


def scorer_of(model: Any, **options: Any) -> tuple[SteeringScorer, list[Any]]:
    prompts = [tokenize(model.tokenizer, q, prompt_set="s", prompt_id=str(n)) for n, q in enumerate(QUESTIONS)]
    return SteeringScorer(model, prompts, COMPLETIONS, **options), prompts


def score(scorer: SteeringScorer, layer: int, vector: torch.Tensor, coefficient: float) -> SteeringScore:
    return scorer.scores([Addition(layer, vector, coefficient)])[0]


def mean_log_probability(name: str, prompt: tuple[int, ...], text: str) -> float:
    ids = [*prompt, *tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logs = tiny.hf_model(name)(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(torch.stack([logs[t - 1, ids[t]] for t in range(len(prompt), len(ids))]).mean())


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_baseline_compares_likelihoods_equal_to_those_of_hugging_face(name: str, engine: str) -> None:
    scorer, prompts = scorer_of(tiny.model(name, engine), new_tokens=4)
    score = scorer.baseline()
    for number, prompt in enumerate(prompts):
        logs = [mean_log_probability(name, prompt.token_ids, text) for text in COMPLETIONS[number]]
        p_positive, p_negative = (torch.tensor(value).exp() for value in logs)
        assert float(score.trait[number]) == pytest.approx(float(p_positive / (p_positive + p_negative)), abs=1e-4)
    assert score.coherence_mean == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_steering_adds_the_vector_to_residual_out_and_leaves_no_hook(engine: str) -> None:
    model = tiny.model("llama", engine)
    tokens = torch.tensor([[5, 6, 7]])
    hooks = {f"blocks.{layer}.hook_resid_post" for layer in range(3)}

    def run() -> dict[str, torch.Tensor]:
        return model.step(tokens, torch.ones_like(tokens), model.start(1), hooks, want_logits=False).cache

    plain, addend = run(), torch.randn(tiny.D_MODEL)
    with applied(model, [Add(layer=1, addend=addend)]):
        steered = run()
    assert torch.equal(steered["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])
    expected = plain["blocks.1.hook_resid_post"] + addend.to(tiny.DEVICE)
    assert torch.allclose(steered["blocks.1.hook_resid_post"], expected, atol=1e-5)
    assert not torch.allclose(steered["blocks.2.hook_resid_post"], plain["blocks.2.hook_resid_post"], atol=1e-2)
    assert all(torch.equal(activation, plain[name]) for name, activation in run().items())


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_additions_that_share_a_batch_score_as_they_do_alone(name: str, engine: str) -> None:
    scorer, _ = scorer_of(tiny.model(name, engine), new_tokens=6)
    drawn = isotropic(tiny.D_MODEL, 3)
    additions = [Addition(0, drawn[0], 0.3), Addition(2, drawn[1], 2.0), Addition(0, drawn[2], -0.5)]
    together = scorer.scores(additions)
    assert len({tuple(each.responses) for each in together}) > 1
    for addition, score, trait in zip(additions, together, scorer.trait_scores(additions), strict=True):
        (alone,) = scorer.scores([addition])
        assert score.responses == alone.responses
        assert torch.allclose(score.trait, alone.trait, atol=1e-5)
        assert torch.allclose(score.coherence, alone.coherence, atol=1e-4)
        assert torch.allclose(trait, alone.trait, atol=1e-5)


def test_rows_that_have_stopped_take_their_addends_along() -> None:
    addends = torch.arange(6.0).reshape(3, 2)
    left = Add(layer=0, addend=addends).of_rows(torch.tensor([True, False, True]))
    changed = left.change(torch.zeros(2, 4, 2))
    assert torch.equal(changed, torch.tensor([[0.0, 1.0], [4.0, 5.0]])[:, None].expand(2, 4, 2))
    with pytest.raises(ValueError, match="addends of 2 rows for a batch of 3"):
        left.change(torch.zeros(3, 4, 2))
    model = tiny.model("llama")
    prompt = tokenize(model.tokenizer, "x", prompt_set="s", prompt_id="1")
    with pytest.raises(ValueError, match="interventions by row"):
        list(generate(model, [prompt], hooks=[], interventions=[Add(layer=0, addend=torch.zeros(1, tiny.D_MODEL))]))


def test_the_standard_error_is_that_of_the_differences_between_questions() -> None:
    scorer, _ = scorer_of(tiny.model("llama"), new_tokens=2)
    baseline = scorer.baseline()
    steered = score(scorer, 1, torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(1)), 1.0)
    gains = [100 * (float(a) - float(b)) for a, b in zip(steered.trait, baseline.trait, strict=True)]
    mean = sum(gains) / 3
    expected = (sum((gain - mean) ** 2 for gain in gains) / 2 / 3) ** 0.5
    assert steered.standard_error(baseline.trait) == pytest.approx(expected, rel=1e-4)
    assert sum(gains) / 3 == pytest.approx(steered.trait_mean - baseline.trait_mean, abs=1e-3)


def test_a_projection_that_grows_with_the_coefficient_follows_it_and_random_ones_do_not() -> None:
    generator = torch.Generator().manual_seed(3)
    vector = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    coefficients = [0.0, 0.1, 0.2, 0.3]
    activations = torch.randn(4, 16, 64, generator=generator)
    along = torch.einsum("cqd,d->cq", activations, vector)
    wanted = torch.arange(4.0)[:, None] + 10 * torch.randn(16, generator=generator)  # questions differ by far more
    activations += (wanted - along)[..., None] * vector
    found = monitoring(coefficients, activations, vector, isotropic(64))
    assert found.rank_correlation == pytest.approx(1.0)
    assert monitoring(coefficients, activations, -vector, isotropic(64)).rank_correlation == pytest.approx(-1)
    assert found.projections == pytest.approx((wanted.mean(dim=1)).tolist(), abs=1e-4)
    assert len(found.null) == 20
    assert max(map(abs, found.null)) < 0.9
    assert found.p == pytest.approx(1 / 21)
    assert found.n == 64


def test_a_random_vector_is_said_to_follow_in_a_twentieth_of_cases() -> None:
    """Also where one dimension has most of the variance, and questions share a drift."""
    generator, random = torch.Generator().manual_seed(5), isotropic(32, RANDOM_VECTORS)
    scale, coefficients = torch.tensor([1.0] + 31 * [0.05]), [0.0, 0.1, 0.2, 0.3]
    found = []
    for _ in range(200):
        drift = torch.arange(4.0)[:, None, None] * torch.randn(32, generator=generator)
        activations = (torch.randn(4, 3, 32, generator=generator) + 0.3 * drift) * scale
        found.append(monitoring(coefficients, activations, torch.randn(32, generator=generator), random).p)
    assert np.mean([p is not None and p <= 0.05 for p in found]) <= 0.05 + 2.6 * (0.05 * 0.95 / 200) ** 0.5


def test_vectors_that_follow_equally_well_are_counted_in_whichever_order_the_questions_are() -> None:
    generator = torch.Generator().manual_seed(0)
    projections = torch.randn(4, 7, generator=generator)
    orders = [torch.randperm(7, generator=generator) for _ in range(20)]
    activations = torch.stack([projections, *(projections[:, order] for order in orders)], dim=-1)
    unit = torch.eye(21)
    assert monitoring([0.0, 0.1, 0.2, 0.3], activations, unit[0], unit[1:]).p == 1


def test_few_or_empty_responses_have_no_correlation_and_equal_ones_have_none_either() -> None:
    drawn = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    few = monitoring([0.0, 0.1], drawn, drawn[0, 0], isotropic(8))
    assert (few.rank_correlation, few.p, few.n) == (None, None, 6)
    same = monitoring([0.0, 0.1], torch.ones(2, 4, 8), torch.ones(8), isotropic(8))
    assert (same.rank_correlation, same.p) == (0.0, 1.0)
    empty = monitoring([0.0, 0.1], torch.full((2, 4, 8), torch.nan), torch.ones(8), isotropic(8))
    assert (empty.projections, empty.rank_correlation, empty.n) == ([None, None], None, 0)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_responses_are_read_back_as_hugging_face_reads_them(engine: str) -> None:
    scorer, prompts = scorer_of(tiny.model("llama", engine), new_tokens=2)
    texts = ["fine", "not so good", ""]
    found = scorer.read(1, texts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[*prompt.token_ids, *ids]])
        with torch.no_grad():
            hidden = tiny.hf_model("llama")(tokens, output_hidden_states=True).hidden_states[2][0]
        expected = hidden[len(prompt.token_ids) :].mean(dim=0)
        assert torch.allclose(found[number], expected, atol=1e-4, equal_nan=True)


def test_a_steered_model_without_finite_logits_is_an_error() -> None:
    scorer, _ = scorer_of(tiny.model("llama"), new_tokens=2)
    with pytest.raises(NumericalError, match=r"steering question 0: the model's logits are NaN or inf at token \d+"):
        score(scorer, 1, torch.full((tiny.D_MODEL,), torch.nan), 1.0)


def test_coherence_falls_with_the_coefficient_and_tiny_steering_changes_nothing() -> None:
    scorer, _ = scorer_of(tiny.model("llama"), new_tokens=6)
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    scores = [score(scorer, 1, vector, coefficient) for coefficient in (1e-6, 0.5, 8.0)]
    assert scores[0].coherence_mean == pytest.approx(100, abs=0.1)
    assert scores[0].trait_mean == pytest.approx(scorer.baseline().trait_mean, abs=0.1)
    assert scores[2].coherence_mean < scores[0].coherence_mean
    assert all(0 <= score.coherence_mean <= 100.0001 for score in scores)


def test_steering_along_the_unembedding_of_a_completion_makes_it_likelier() -> None:
    model = tiny.model("llama")
    scorer, _ = scorer_of(model, new_tokens=2)
    ids = [tiny.tokenizer()(pair[0], add_special_tokens=False)["input_ids"] for pair in COMPLETIONS]
    flat = sorted({i for one in ids for i in one})
    towards = tiny.hf_model("llama").lm_head.weight[flat].mean(0).detach()
    assert score(scorer, 2, towards, 2.0).trait_mean > scorer.baseline().trait_mean


def test_without_completions_the_typical_norm_is_that_of_the_models_own_responses() -> None:
    model = tiny.model("llama")
    prompts = [tokenize(model.tokenizer, q, prompt_set="s", prompt_id=str(n)) for n, q in enumerate(QUESTIONS)]
    scorer = SteeringScorer(model, prompts, [None] * len(prompts), new_tokens=3)
    score = scorer.baseline()
    assert score.trait.isnan().all()
    assert score.coherence_mean == pytest.approx(100, abs=1e-3)
    norms = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt.token_ids)
            for _ in range(3):
                best = int(tiny.hf_model("llama")(torch.tensor([ids])).logits[0, -1].argmax())
                if best == model.tokenizer.eos_token_id:
                    break
                ids.append(best)
            hidden = tiny.hf_model("llama")(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
            norms.append(hidden[len(prompt.token_ids) - 1 :].norm(dim=-1))
    assert scorer.typical_norm(1) == pytest.approx(float(torch.cat(norms).median()), rel=1e-4)


def test_the_search_finds_the_largest_coherent_coefficient() -> None:
    from types import SimpleNamespace

    from tlcapture.commands.steer import search_coefficient

    asked = []

    def score(coefficient: float) -> Any:
        asked.append(coefficient)
        return SimpleNamespace(coherence_mean=100 - 100 * coefficient)

    found = search_coefficient(score)
    assert 0.25 <= found <= 0.3
    assert len(asked) <= 8
