"""Random directions: their covariance, and what they count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tlcapture.errors import StorageError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.projections.projection import project
from tlcapture.traits.selection import Selection
from tlcapture.traits.statistics.chance import N_DIRECTIONS, RandomDirections, _generator, _Layer
from tlcapture.traits.statistics.reference import Reference, read_reference
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.residual import ResidualStream

WIDTH, LAYERS = 32, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector(layer: int = 1, name: str = "a", seed: int = 5) -> TraitVector:
    return TraitVector(Trait("c", name), "residual", "probe", layer, "exp", random(WIDTH, seed=seed), {})


def stream(n_tokens: int, seed: int) -> ResidualStream:
    return ResidualStream(random(2 * LAYERS + 1, n_tokens, WIDTH, seed=seed))


def reference(scale: float = 1.0) -> Reference:
    means = random(LAYERS, 40, WIDTH, seed=2), random(LAYERS, 40, WIDTH, seed=3)
    means[1][:, :, 4] *= scale
    return Reference("print", "digest", [f"set/{number}" for number in range(40)], *means)


def projected(directions: RandomDirections, *vectors: TraitVector, response: ResidualStream | None = None):
    chosen = [(each, Selection(each.layer, each.method, "override")) for each in vectors]
    return project(stream(30, 7), response or stream(50, 8), chosen, random=directions)


def test_random_directions_commit_as_seldom_as_chance_allows() -> None:
    (found,) = projected(RandomDirections(None, LAYERS, WIDTH), vector())
    assert found.chance is not None
    assert found.chance.covariance == "isotropic"
    assert found.chance.commit <= 0.1 * N_DIRECTIONS
    assert found.chance.persist <= 0.12 * N_DIRECTIONS
    assert found.dynamics.commitment_point is None or found.chance.commitment is not None


def test_random_directions_are_combinations_of_responses_as_defined_in_numpy() -> None:
    """Over a reference prompt, the part of each that is the prompt's own response is left out."""
    made, activation = reference(), random(WIDTH, seed=9)
    directions, own = RandomDirections(made, LAYERS, WIDTH), vector()
    responses = made.response_means[1].double().numpy()
    basis, moved = responses - responses.mean(axis=0), responses - made.prompt_means[1].double().numpy()
    drawn = torch.randn(N_DIRECTIONS, 40, generator=_generator("c/a", 1)).double().numpy()
    weights = drawn / np.linalg.norm(drawn @ basis, axis=1, keepdims=True)
    found = directions.projections("c/a", 1, activation)
    assert np.allclose(found, weights @ basis @ activation.double().numpy(), rtol=1e-5, atol=1e-5)
    rises = [[(row * (np.arange(40) != prompt)) @ basis @ moved[prompt] for row in weights] for prompt in range(40)]
    means, deviations = directions._layer(1).reference_rises(own, made)
    assert np.allclose(means[1:], np.mean(rises, axis=0), rtol=1e-4, atol=1e-5)
    assert np.allclose(deviations[1:], np.std(rises, axis=0, ddof=1), rtol=1e-4)
    of_vector = moved @ own.vector.double().numpy() / np.linalg.norm(own.vector.double().numpy())
    assert (means[0], deviations[0]) == pytest.approx((of_vector.mean(), of_vector.std(ddof=1)))


def test_a_change_that_all_directions_share_is_not_a_finding_of_one() -> None:
    """A template can shift the level of every direction: the vector commits, but not more clearly than they do."""
    response = stream(50, 8)
    response.points[:, 25:] += 3 * random(WIDTH, seed=9)
    (found,) = projected(RandomDirections(None, LAYERS, WIDTH), vector(), response=response)
    assert found.dynamics.commitment_point == pytest.approx(30 + 25, abs=1)
    assert found.chance is not None
    assert found.chance.commit > 0.5 * N_DIRECTIONS
    assert (found.chance.commitment or 0) > 0.05


def test_a_change_along_the_vector_alone_is_clearer_than_that_of_random_directions() -> None:
    each, response = vector(), stream(50, 8)
    response.points[:, 25:] += 3 * each.vector / each.vector.norm()
    (found,) = projected(RandomDirections(None, LAYERS, WIDTH), each, response=response)
    assert found.chance is not None
    assert found.chance.commitment is not None
    assert found.chance.commitment <= 0.05


def test_directions_have_the_covariance_of_the_reference() -> None:
    directions = RandomDirections(reference(scale=100.0), LAYERS, WIDTH)
    layer = directions._layers.setdefault(1, _Layer(1, directions.reference, WIDTH))
    drawn = layer.directions("all") @ layer.basis
    assert torch.allclose(drawn.norm(dim=1), torch.ones(N_DIRECTIONS), atol=1e-4)
    assert (drawn[:, 4].abs() > 0.9).float().mean() > 0.8


def test_rises_are_those_of_the_directions_and_standardised_over_the_reference() -> None:
    made = reference()
    directions, each = RandomDirections(made, LAYERS, WIDTH), vector()
    (found,) = projected(directions, each)
    layer = directions._layers.setdefault(1, _Layer(1, directions.reference, WIDTH))
    drawn = (layer.directions("c/a") @ layer.basis).double()
    moved = stream(50, 8).at(1, "residual_out").mean(dim=0) - stream(30, 7).at(1, "residual_out")[1:].mean(dim=0)
    assert found.chance is not None
    assert np.allclose(found.chance.rises, (drawn @ moved.double()).numpy(), rtol=1e-3, atol=1e-5)
    over = (made.response_means[1] - made.prompt_means[1]).double()
    # What a direction has of a prompt's own response is no part of its rise there.
    parts = layer.directions("c/a").double().T[:, :, None] * layer.basis.double()[:, None]
    rises = torch.einsum("pd,prd->pr", over, drawn - parts)
    expected = (drawn @ moved.double() - rises.mean(dim=0)) / rises.std(dim=0)
    assert found.chance.standardised is not None
    assert np.allclose(found.chance.standardised, expected.numpy(), rtol=1e-3, atol=1e-4)
    own = over @ (each.vector.double() / each.vector.double().norm())
    assert found.chance.reference_rises == pytest.approx((float(own.mean()), float(own.std())))


def test_random_directions_rise_as_far_over_the_reference_as_over_another_prompt() -> None:
    """They are made of the reference's responses, over which they would rise further than over those of others."""
    few, wide = 12, 64
    means = random(LAYERS, few, wide, seed=2), random(LAYERS, few, wide, seed=3)
    layer = _Layer(1, Reference("print", "digest", [str(number) for number in range(few)], *means), wide)
    own = TraitVector(Trait("c", "a"), "residual", "probe", 1, "exp", random(wide), {})
    _, deviations = layer.reference_rises(own, layer.reference)
    others = (random(300, wide, seed=4) - random(300, wide, seed=5)) @ (layer.directions("c/a") @ layer.basis).T
    assert float(others.std(dim=0).mean()) == pytest.approx(deviations[1:].mean(), rel=0.1)


def test_random_vectors_have_the_covariance_of_responses_and_are_the_same_combinations_at_every_layer() -> None:
    made = reference(scale=20.0)
    drawn = RandomDirections(made, LAYERS, WIDTH).vectors(20, 1)
    assert drawn.norm(dim=1).tolist() == pytest.approx([1.0] * 20)
    assert float(drawn[:, 4].square().mean()) > 0.5  # of a dimension that varies the most over responses
    same = torch.stack([made.response_means[0]] * LAYERS)
    alike = RandomDirections(Reference("print", "digest", made.prompts, same, same), LAYERS, WIDTH)
    assert torch.equal(alike.vectors(3, 0), alike.vectors(3, 2))
    isotropic = RandomDirections(None, LAYERS, WIDTH)
    assert torch.equal(isotropic.vectors(3, 0), isotropic.vectors(3, 2))


def test_traits_of_one_layer_have_directions_of_their_own_and_every_run_the_same() -> None:
    one, other = projected(RandomDirections(None, LAYERS, WIDTH), vector(name="a"), vector(name="b"))
    (again,) = projected(RandomDirections(None, LAYERS, WIDTH), vector(name="a"))
    assert one.chance is not None
    assert other.chance is not None
    assert again.chance is not None
    assert not np.allclose(one.chance.rises, other.chance.rises)
    assert one.chance.rises.tolist() == again.chance.rises.tolist()
    assert one.chance.commit == other.chance.commit == again.chance.commit


def test_a_reference_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    assert read_reference(layout, "residual") is None
    made = reference()
    made.write(layout, "residual")
    found = read_reference(layout, "residual")
    assert found is not None
    assert torch.equal(found.response_means, made.response_means)
    assert found.prompts == made.prompts
    torch.save({"format_version": 1, "prompts": ["a"]}, layout.reference("residual"))
    with pytest.raises(StorageError, match="not a valid reference: prompt_means: expected a finite tensor"):
        read_reference(layout, "residual")


@pytest.mark.parametrize("at_once", [1, 10_000, 2**18])
def test_vectors_of_several_layers_have_the_chance_levels_that_each_has_alone(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcapture.traits.statistics.chance._AT_ONCE", at_once)
    vectors = [vector(2, "a"), vector(0, "b"), vector(2, "c"), vector(1, "d")]
    together = projected(RandomDirections(reference(), LAYERS, WIDTH), *vectors)
    for each, found in zip(vectors, together, strict=True):
        (alone,) = projected(RandomDirections(reference(), LAYERS, WIDTH), each)
        assert alone.chance is not None
        assert found.chance is not None
        for name in ("directions", "commit", "persist", "commitment", "persistence"):
            assert getattr(found.chance, name) == getattr(alone.chance, name), name
        assert np.allclose(found.chance.rises, alone.chance.rises, rtol=1e-3)
        assert found.chance.reference_rises == pytest.approx(alone.chance.reference_rises)
        assert found.chance.standardised is not None
        assert np.allclose(found.chance.standardised, alone.chance.standardised, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("of_reference", [1.0, None])
def test_what_random_directions_do_does_not_depend_on_the_scale_of_activations(
    scale: float, of_reference: float | None
) -> None:
    one = reference()
    larger = Reference(*list(vars(one).values())[:3], one.prompt_means * scale, one.response_means * scale)
    (usual,) = projected(RandomDirections(one, LAYERS, WIDTH), vector())
    parts = [ResidualStream(stream(*each).points * scale) for each in ((30, 7), (50, 8))]
    directions = RandomDirections(larger if of_reference else one, LAYERS, WIDTH)
    (found,) = project(*parts, [(vector(), Selection(1, "probe", "override"))], random=directions)
    assert usual.chance is not None
    assert found.chance is not None
    for name in ("commit", "persist", "commitment", "persistence"):
        assert getattr(found.chance, name) == getattr(usual.chance, name), name


def test_rises_do_not_depend_on_the_order_of_tokens_nor_on_the_first() -> None:
    directions, response = RandomDirections(reference(), LAYERS, WIDTH), stream(12, 8)
    response.points[:, 0] += 20 * vector().unit
    (one,) = projected(directions, vector(), response=response)
    prompt = stream(30, 7).points[:, [0, *range(29, 0, -1)]]
    prompt[:, 0] *= 1e3
    parts = ResidualStream(prompt), ResidualStream(response.points.flip(1))
    (other,) = project(*parts, [(vector(), Selection(1, "probe", "override"))], random=directions)
    assert one.chance is not None
    assert other.chance is not None
    assert np.allclose(one.chance.rises, other.chance.rises, rtol=1e-3, atol=1e-5)
    assert np.allclose(one.chance.standardised, other.chance.standardised, rtol=1e-3, atol=1e-4)
    assert one.chance.widening > 1
    assert other.chance.widening == pytest.approx(one.chance.widening, rel=1e-4)
    assert other.rise == pytest.approx(one.rise, rel=1e-3)


def test_without_tokens_of_the_prompt_changes_are_known_beside_chance_and_rises_are_not() -> None:
    (whole,) = projected(RandomDirections(reference(), LAYERS, WIDTH), vector())
    chosen = [(vector(), Selection(1, "probe", "override"))]
    for n_held in (0, 3):
        held = Positions((*range(n_held), *range(30, 80)), 30, 80)
        directions = RandomDirections(reference(), LAYERS, WIDTH)
        prompt = stream(30, 7).select(range(n_held))
        (part,) = project(prompt, stream(50, 8), chosen, random=directions, held=held)
        assert part.trajectory[n_held:30].isnan().all()
        assert torch.equal(part.trajectory[list(held.kept)], whole.trajectory[list(held.kept)])
        assert part.dynamics.commitment_p == pytest.approx(whole.dynamics.commitment_p)
        assert part.chance is not None
        assert whole.chance is not None
        assert (part.chance.commit, part.chance.commitment) == (whole.chance.commit, whole.chance.commitment)
        unknown = ("persist", "persistence", "rises", "reference_rises", "standardised", "largest_rise")
        assert [getattr(part.chance, name) for name in unknown] == [None] * len(unknown)


def test_a_vector_that_is_clearer_than_all_random_directions_is_counted_itself() -> None:
    each, response = vector(), stream(50, 8)
    response.points[:, 25:] += 1e4 * each.unit
    (found,) = projected(RandomDirections(None, LAYERS, WIDTH), each, response=response)
    assert found.chance is not None
    assert found.chance.commitment == pytest.approx(1 / 201)
