"""Sampling on the device: its distribution, its independence of the batch, and that no step waits for the device."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from tests import tiny
from tests.test_parity import as_prompt, random_ids
from tlcapture.generation.loop import generate
from tlcapture.generation.recording.transfers import Download
from tlcapture.generation.sampling.next_token import GREEDY, choose_tokens, n_numbers
from tlcapture.generation.sampling.noise import GumbelNoise, _mixed, _signed, stream_start
from tlcapture.generation.sampling.processors import LogitProcessors, LogitRules, PromptTokens
from tlcapture.models.streams import upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def noise(n_rows: int, d_vocab: int, n_steps: int = 1, device: str = "cpu") -> GumbelNoise:
    starts = [stream_start(0, as_prompt([5], str(row))) for row in range(n_rows)]
    return GumbelNoise(starts, n_numbers(d_vocab), n_steps, torch.device(device))


def test_streams_are_those_of_splitmix64() -> None:
    """The numbers are those of its author's program for the seed 1234567."""
    states = 1234567 + torch.arange(1, 6) * _signed(0x9E3779B97F4A7C15)
    assert [number % 2**64 for number in _mixed(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_noise_is_that_of_a_standard_gumbel_distribution_at_every_step_and_row() -> None:
    drawn = noise(40, 90_000, 3)
    for _ in range(3):
        step = drawn.next().double().neg().exp().neg().exp()  # the distribution function, which makes it uniform
        assert step.mean(dim=1).sub(0.5).abs().max() < 5 * (1 / 12 / 600) ** 0.5
        assert step.mean(dim=0).sub(0.5).abs().max() < 5 * (1 / 12 / 40) ** 0.5
        distance = (step.flatten().sort().values - torch.linspace(0, 1, step.numel())).abs().max()
        assert distance < 1.95 / step.numel() ** 0.5  # Kolmogorov's bound at 0.001


def test_the_noise_of_a_step_is_the_same_whichever_rows_are_left_and_how_many_are_computed_at_once() -> None:
    whole, left = noise(5, 100, 40), noise(5, 100, 17)
    for step in range(40):
        if step in (3, 16, 20):
            left.keep([1, 3] if step == 3 else [0, 1])
        expected, found = whole.next(), left.next()
        assert torch.equal(found, expected if step < 3 else expected[[1, 3]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d_vocab", [1, 2, 3, 7, 16, 257])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_draws_have_the_distribution_of_the_softmax(d_vocab: int, temperature: float, device: str) -> None:
    """Chi-square over the tokens of which more than five are expected, the others together."""
    logits = torch.randn(d_vocab, generator=torch.Generator().manual_seed(d_vocab)) * 2
    expected = (logits.double() / temperature).softmax(0)
    n_draws, drawn = 30_000, torch.zeros(d_vocab)
    rows = noise(n_draws // 10, d_vocab, 10, device)
    for _ in range(10):
        choice = choose_tokens(logits.to(device).expand(n_draws // 10, -1), temperature, rows.next())
        drawn += torch.bincount(choice.tokens.cpu(), minlength=d_vocab)
    often = expected * n_draws > 5
    counts = torch.cat([drawn[often], drawn[~often].sum()[None]])
    means = n_draws * torch.cat([expected[often], expected[~often].sum()[None]])
    kept = means > 0
    statistic, freedom = ((counts - means) ** 2 / means)[kept].sum(), int(kept.sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly normal.
    if freedom:
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
        assert z < 4


def test_tokens_that_are_very_unlikely_together_are_drawn_as_often_as_they_should() -> None:
    """A third of the probability lies on one token, the rest on 200,000 alike."""
    d_vocab = 200_001
    logits = torch.zeros(1, d_vocab)
    logits[0, 77] = math.log((d_vocab - 1) / 2)
    tokens = torch.cat(
        [
            choose_tokens(logits.expand(50, -1), 1.0, rows.next()).tokens
            for rows in [noise(50, d_vocab, 20)]
            for _ in range(20)
        ]
    )
    assert (tokens == 77).float().mean() == pytest.approx(1 / 3, abs=5 * (2 / 9 / 1000) ** 0.5)
    others = tokens[tokens != 77].double() / d_vocab
    assert others.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / len(others)) ** 0.5)
    assert others.std() == pytest.approx(12**-0.5, rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_flat_probabilities_over_a_large_vocabulary_give_the_same_tokens_in_every_batch(device: str) -> None:
    """Another batch changes logits by rounding; an inverse distribution function has a boundary at every token."""
    generator = torch.Generator().manual_seed(0)
    n_rows, d_vocab = 40, 200_000
    logits = torch.randn(n_rows, d_vocab, generator=generator) * 0.1
    rounded = logits * (1 + 2e-7 * torch.randn(n_rows, d_vocab, generator=generator))
    together, alone = noise(n_rows, d_vocab, 3, device), noise(n_rows, d_vocab, 3)
    for _ in range(3):
        batch, single = together.next(), alone.next()
        tokens = choose_tokens(logits.to(device), 0.7, batch).tokens.tolist()
        for row in range(n_rows):
            own = choose_tokens(rounded[row : row + 1], 0.7, single[row : row + 1])
            assert own.tokens.tolist() == [tokens[row]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logits_that_are_not_finite_are_reported_and_their_token_is_of_the_vocabulary(
    dtype: torch.dtype, temperature: float
) -> None:
    rows = torch.zeros(6, 1000, dtype=dtype)
    rows[0, 999] = math.nan
    rows[1, 998] = math.inf
    rows[2] = -math.inf
    rows[3, :999] = -math.inf
    rows[4, 0], rows[4, 500] = math.inf, -math.inf
    rows[5, 0] = -math.inf
    choice = choose_tokens(rows, temperature, noise(6, 1000).next())
    assert choice.is_finite.tolist() == [False, False, False, True, False, True]
    assert int(choice.tokens[3]) == 999 and int(choice.tokens[5]) != 0
    assert all(0 <= token < 1000 for token in choice.tokens.tolist())


@pytest.mark.parametrize(
    "rule", [{"repetition_penalty": 1.3}, {"typical_p": 0.8}, {"epsilon_cutoff": 0.003}, {"top_k": 5}, {"top_p": 0.9},
             {"min_p": 0.1}, {"top_h": 0.5}, {"eta_cutoff": 0.003}], ids=str,
)  # fmt: skip
def test_under_any_rule_a_row_that_is_not_finite_fails_alone(rule: dict[str, Any]) -> None:
    """Two classes of transformers raise an error for all rows."""
    prompts = [PromptTokens((4, 5 + row), frozenset({1}), 6) for row in range(3)]
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    expected = LogitProcessors(LogitRules(**rule), 0.7, prompts)(logits)
    for broken in (math.nan, math.inf, -math.inf):
        rows = logits.clone()
        rows[1, slice(None) if broken == -math.inf else 100] = broken
        scores = LogitProcessors(LogitRules(**rule), 0.7, prompts)(rows)
        assert torch.equal(scores[[0, 2]], expected[[0, 2]])
        assert choose_tokens(scores, 1.0, noise(3, 300).next()).is_finite.tolist() == [True, False, True]


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((200, 300), -math.inf)
    logits[:, [3, 299]] = torch.tensor([-60.0, 0.0])
    logits[:, 17] = 0
    tokens = choose_tokens(logits, 1.0, noise(200, 300).next()).tokens
    assert set(tokens.tolist()) == {17, 299}


def test_the_next_tokens_are_being_run_before_main_memory_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = tiny.model("llama"), []
    step, read = type(model).step, Download.read
    monkeypatch.setattr(type(model), "step", lambda *args, **options: events.append("run") or step(*args, **options))
    monkeypatch.setattr(Download, "read", lambda self: events.append("read") or read(self))
    options: Any = {"hooks": ["blocks.0.hook_resid_pre"], "max_new_tokens": 4}
    assert list(generate(model, [as_prompt(random_ids(5), "1")], sampling=GREEDY, **options))
    assert events == ["run", "run", "read", "run", "read", "run", "read", "run", "read"]


RULES = LogitRules(repetition_penalty=1.2, suppress_tokens=[3], top_k=50, top_p=0.9, min_p=0.01)


@pytest.mark.parametrize("rules", [LogitRules(), RULES])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_choice_waits_for_nothing_on_the_device(temperature: float, rules: LogitRules) -> None:
    """The device `meta` has no numbers: whatever needs one in main memory raises."""
    device = torch.device("meta")
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(3, device=device).max().item()
    prompts = [PromptTokens((1, 2, 3), frozenset({0}), 5)] * 4
    processors = LogitProcessors(rules, temperature, prompts)
    rows = GumbelNoise([1, 2, 3, 4], n_numbers(1000), 5, device) if temperature else None
    for n_rows in (4, 4, 2):
        if n_rows == 2:
            processors.keep([0, 3])
            if rows:
                rows.keep([0, 3])
        logits = torch.empty(n_rows, 1000, device=device)
        choice = choose_tokens(processors(logits) if processors else logits, temperature, rows and rows.next())
        processors.append(choice.tokens)
        assert choice.tokens.shape == choice.is_finite.shape == (n_rows,)
        assert choice.tokens.is_meta


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-30, 1e30, 1e38, 1e300])
def test_no_temperature_draws_a_token_that_has_no_probability(temperature: float) -> None:
    prompts = [PromptTokens((5,), frozenset(), 1)] * 40
    for d_vocab, dtype in product([2, 3, 1000], [torch.float32, torch.bfloat16, torch.float16]):
        logits = torch.randn(40, d_vocab, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
        logits[:, 0] = -math.inf
        processed = LogitProcessors(LogitRules(top_p=0.999), temperature, prompts)(logits)
        for scores, divisor in ((logits, temperature), (processed, 1.0)):
            choice = choose_tokens(scores, divisor, noise(40, d_vocab).next())
            assert choice.is_finite.all()
            assert (choice.tokens > 0).all()
            if temperature < 1:
                assert torch.equal(logits.gather(1, choice.tokens[:, None])[:, 0], logits.amax(dim=1))


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", "cpu"])
def test_only_cuda_gets_numbers_whose_memory_is_freed_before_they_have_arrived(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy to MPS that does not block reads its source later (pytorch #139550 and #189690)."""
    asked: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: asked.append(non_blocking) or self)
    upload([1, 2], torch.device(kind))
    assert asked == [kind == "cuda"]
