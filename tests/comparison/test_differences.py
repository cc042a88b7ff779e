"""Differences of activations and distributions, against torch's own functions and closed forms."""

from __future__ import annotations

import pytest
import torch

from tlcapture.comparison import differences
from tlcapture.comparison.differences import cosine, divergence, norm_ratio, projected
from tlcapture.errors import NumericalError


def residuals(n_tokens: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_activations_have_cosine_and_ratio_of_exactly_one(dtype: torch.dtype) -> None:
    same = (residuals(200) * 37).to(dtype)
    assert torch.equal(cosine(same, same.clone()), torch.ones(200, dtype=torch.float64))
    assert torch.equal(norm_ratio(same, same.clone()), torch.ones(200, dtype=torch.float64))


def test_cosine_and_ratio_are_those_of_torch() -> None:
    a, b = residuals(), residuals(seed=1)
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    torch.testing.assert_close(cosine(a, b), expected)
    torch.testing.assert_close(norm_ratio(a, b), b.double().norm(dim=-1) / a.double().norm(dim=-1))


def test_scaled_and_reversed_activations() -> None:
    a = residuals()
    torch.testing.assert_close(cosine(a, -3 * a), torch.full((5,), -1.0, dtype=torch.float64))
    torch.testing.assert_close(norm_ratio(a, -3 * a), torch.full((5,), 3.0, dtype=torch.float64))


def test_what_a_zero_vector_leaves_undefined_is_nan() -> None:
    zero = torch.zeros(2, 16)
    assert cosine(zero, residuals(2)).isnan().all()
    assert norm_ratio(zero, residuals(2)).isnan().all()
    assert norm_ratio(residuals(2), zero).tolist() == [0, 0]


def test_a_projection_does_not_depend_on_the_length_of_the_vector() -> None:
    activations, vector = residuals(), torch.arange(1.0, 17)
    expected = activations.double() @ (vector.double() / vector.double().norm())
    torch.testing.assert_close(projected(activations, vector), expected)
    torch.testing.assert_close(projected(activations, 5 * vector), expected)


def test_the_divergence_is_that_of_torchs_distributions_of_a_from_b() -> None:
    weights = torch.randn(16, 300, generator=torch.Generator().manual_seed(2))
    a, b = residuals(), residuals(seed=1)
    found = divergence(a, b, lambda each: each @ weights, lambda each: 0.5 * each @ weights, 300)
    of_a, of_b = (torch.distributions.Categorical(logits=each.double()) for each in (a @ weights, 0.5 * b @ weights))
    expected = torch.distributions.kl_divergence(of_a, of_b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(found, torch.distributions.kl_divergence(of_b, of_a), rtol=0.05)


def test_the_divergence_of_equal_distributions_is_exactly_zero_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcapture.comparison.differences._AT_ONCE", 600)
    weights = torch.randn(16, 300, generator=torch.Generator().manual_seed(2))
    found = divergence(residuals(7), residuals(7), lambda each: each @ weights, lambda each: each @ weights, 300)
    assert found.tolist() == [0.0] * 7


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_the_divergence_is_computed_where_the_logits_are_unless_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = torch.randn(16, 300, generator=torch.Generator().manual_seed(2))
    expected = divergence(residuals(), residuals(seed=1), lambda each: each @ weights, lambda each: each @ weights, 300)
    kinds: list[type] = []
    memory = [True]
    copy, compute = torch.Tensor.cpu, differences._divergence

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kinds.append(type(a))
        if not memory[0] and type(a) is OnGpu:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(a, b)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda each: copy(each).as_subclass(torch.Tensor))
    monkeypatch.setattr(differences, "_divergence", counted)

    def unembed(each: torch.Tensor) -> torch.Tensor:
        return (each @ weights).as_subclass(OnGpu)

    for memory[0], where in ((True, [OnGpu]), (False, [OnGpu, torch.Tensor])):
        kinds.clear()
        assert torch.equal(divergence(residuals(), residuals(seed=1), unembed, unembed, 300), expected)
        assert kinds == where


def test_a_token_that_a_rules_out_counts_nothing_and_one_that_b_rules_out_is_refused() -> None:
    masked = torch.tensor([[0.0, 0.0, -torch.inf]])
    plain = torch.zeros(1, 3)
    found = divergence(plain[:, :1], plain[:, :1], lambda each: masked, lambda each: plain, 3)
    assert found.item() == pytest.approx(torch.log(torch.tensor(1.5)).item())
    with pytest.raises(NumericalError, match="not finite: leave it out with --no-kl"):
        divergence(plain[:, :1], plain[:, :1], lambda each: plain, lambda each: masked, 3)
