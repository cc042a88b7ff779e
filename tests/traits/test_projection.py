"""Projection against its definition, `h . v / ||v||`, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tlcapture.errors import NumericalError, VectorError
from tlcapture.names import Trait
from tlcapture.storage.files import write_json
from tlcapture.traits.centring import Centred
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.projection import dynamics_of_file, project, projections_to_json
from tlcapture.traits.selection import Selection
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.hooks import POINTS
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.residual import ResidualStream

WIDTH, LAYERS = 16, 4


def vector(name: str, layer: int, values: torch.Tensor, component: str = "residual") -> TraitVector:
    return TraitVector(Trait("c", name), component, "probe", layer, "exp", values, {"extraction_model": "m"})


def stream(n_tokens: int, dtype: torch.dtype = torch.float32) -> ResidualStream:
    torch.manual_seed(n_tokens)
    return ResidualStream(
        torch.randn(2 * LAYERS + 1, n_tokens, WIDTH).to(dtype), torch.randn(LAYERS, n_tokens, WIDTH).to(dtype)
    )


def chosen(*vectors: TraitVector) -> list[tuple[TraitVector, Selection]]:
    return [(each, Selection(each.layer, each.method, "override")) for each in vectors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layer_point_and_token_is_h_times_v_over_the_length_of_v(dtype: torch.dtype) -> None:
    prompt, response = stream(5, dtype), stream(3, dtype)
    torch.manual_seed(1)
    vectors = [vector("a", 1, torch.randn(WIDTH) * 50), vector("b", 2, torch.randn(WIDTH))]
    for each, projection in zip(vectors, project(prompt, response, chosen(*vectors)), strict=True):
        assert projection.prompt.shape == (5, LAYERS, 3)
        unit = each.vector.double() / each.vector.double().norm()
        for part, scores in ((prompt, projection.prompt), (response, projection.response)):
            for layer in range(LAYERS):
                for number, point in enumerate(POINTS):
                    expected = part.at(layer, point).double() @ unit
                    assert torch.allclose(scores[:, layer, number].double(), expected, atol=1e-5)


def test_the_trajectory_is_residual_out_at_the_vectors_own_layer() -> None:
    prompt, response, each = stream(5), stream(3), vector("a", 2, torch.randn(WIDTH))
    (projection,) = project(prompt, response, chosen(each))
    unit = each.vector / each.vector.norm()
    line = torch.cat([prompt.at(2, "residual_out"), response.at(2, "residual_out")]) @ unit
    assert torch.allclose(projection.trajectory, line, atol=1e-5)


def test_attn_out_has_one_score_per_layer() -> None:
    prompt, response, each = stream(5), stream(3), vector("a", 1, torch.randn(WIDTH), "attn_out")
    (projection,) = project(prompt, response, chosen(each))
    assert projection.response.shape == (3, LAYERS, 1)
    assert prompt.attn_out is not None
    expected = prompt.attn_out[1] @ (each.vector / each.vector.norm())
    assert torch.allclose(projection.prompt[:, 1, 0], expected, atol=1e-5)


def test_attn_out_that_was_not_captured_is_an_error() -> None:
    bare = ResidualStream(stream(2).points)
    with pytest.raises(VectorError, match="--capture-attn"):
        project(bare, bare, chosen(vector("a", 1, torch.ones(WIDTH), "attn_out")))


def test_a_vector_of_another_width_is_an_error_naming_its_origin() -> None:
    with pytest.raises(
        VectorError,
        match=r"probe vector of c/a at layer 1 in experiment 'exp' has width 9, but the activations have width 16",
    ):
        project(stream(2), stream(2), chosen(vector("a", 1, torch.ones(9))))


def test_a_vector_of_a_layer_that_the_model_does_not_have_is_an_error() -> None:
    with pytest.raises(VectorError, match=r"layer 7 .* is from another model: the captured one has layers 0 to 3"):
        project(stream(2), stream(2), chosen(vector("a", 7, torch.ones(WIDTH))))


def test_damaged_activations_are_an_error() -> None:
    damaged = stream(2)
    damaged.points[3, 1, 2] = float("inf")
    with pytest.raises(NumericalError, match="NaN or inf"):
        project(damaged, stream(2), chosen(vector("a", 1, torch.ones(WIDTH))))


def test_dynamics_can_be_recomputed_from_the_file(tmp_path: Path) -> None:
    (projection,) = project(stream(5), stream(9), chosen(vector("a", 2, torch.randn(WIDTH))))
    tokens = {"prompt": {"tokens": ["a"] * 5}, "response": {"tokens": ["a"] * 9}}
    path = tmp_path / "1.json"
    (found,) = projections_to_json([projection])
    write_json(path, {**tokens, **found, "metadata": {"vector_source": projection.source()}})
    again = dynamics_of_file(ProjectionFile.read(path))
    assert again.commitment_point == projection.dynamics.commitment_point
    assert torch.allclose(again.velocity, projection.dynamics.velocity, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_left_of_an_ablated_direction_is_rounding_and_has_no_dynamics(
    dtype: torch.dtype, offset: float
) -> None:
    """Nor has a direction that is capped everywhere; what was stored as float32 may have been rounded before."""
    torch.manual_seed(1)
    vectors = [vector(str(n), 1, torch.randn(WIDTH)) for n in range(3)]
    for each in vectors:
        parts = [stream(n, dtype).points.float() for n in (12, 30)]
        unit = each.unit
        ablated = [(part - (part @ unit)[..., None] * unit + offset * unit).to(dtype) for part in parts]
        other = vector("other", 1, torch.randn(WIDTH))
        for stored in (dtype, torch.float32):
            streams = [ResidualStream(part.to(stored)) for part in ablated]
            found, moves = project(*streams, chosen(each, other), random=RandomDirections(None, LAYERS, WIDTH))
            assert (found.still_from, moves.still_from) == (1, None)
            dynamics, means = found.dynamics, found.means()
            assert (dynamics.commitment_point, dynamics.commitment_shift, dynamics.persistence) == (None, 0, None)
            assert (dynamics.peak_velocity, means["deviation"], means["response"]) == (0, 0, means["prompt"])
            assert means["prompt"] == pytest.approx(offset, abs=0.02)


def test_a_still_response_after_a_prompt_that_moves_has_no_dynamics_nor_has_its_file(
    tmp_path: Path,
) -> None:
    each, prompt, drawn = vector("a", 2, torch.randn(WIDTH)), stream(5), [stream(n).points for n in range(30, 50)]
    responses = [ResidualStream(part - (part @ each.unit)[..., None] * each.unit) for part in drawn]
    found = [project(prompt, response, chosen(each))[0] for response in responses]
    assert {projection.still_from for projection in found} == {5}
    scores, means = found[0].trajectory.numpy().astype(float), found[0].means()
    with_level = np.concatenate([scores[1:5], np.full(len(scores) - 5, scores[5:].mean())])
    assert means == pytest.approx({
        "prompt": scores[1:5].mean(), "response": scores[5:].mean(), "deviation": with_level.std(),
        "response_deviation": 0.0,
    }, rel=1e-5)  # fmt: skip
    assert {projection.dynamics.commitment_point for projection in found} == {None}
    assert {projection.dynamics.commitment_shift for projection in found} == {0}
    assert all(max(projection.dynamics.velocity[:4].abs()) > 0.1 for projection in found)  # of the prompt
    tokens = {"prompt": {"tokens": ["a"] * 5}, "response": {"tokens": ["a"] * 30}}
    metadata = {"vector_source": found[0].source(), "means": found[0].means()}
    write_json(tmp_path / "1.json", {**tokens, **projections_to_json(found[:1])[0], "metadata": metadata})
    again = dynamics_of_file(ProjectionFile.read(tmp_path / "1.json"))
    assert (again.commitment_point, again.commitment_shift) == (None, 0)
    held = Positions((0, 1, *range(3, 35)), 5, 35)
    parts = ResidualStream(prompt.points[:, [0, 1, 3, 4]]), responses[0]
    assert project(*parts, chosen(each), held=held)[0].still_from == 5


@pytest.mark.parametrize("n_response", [1, 2])
def test_a_single_value_after_the_first_is_not_taken_for_rounding(n_response: int) -> None:
    torch.manual_seed(3)
    (found,) = project(stream(1), stream(n_response), chosen(vector("a", 1, torch.randn(WIDTH))))
    assert found.still_from is None
    assert (found.dynamics.peak_velocity != 0) == (n_response > 1)


def test_a_small_trajectory_beside_massive_dimensions_is_not_taken_for_rounding() -> None:
    torch.manual_seed(2)
    parts = [stream(n).points.clone() for n in (12, 30)]
    for part in parts:
        part[..., 3] = 3000.0
    direction = torch.randn(WIDTH)
    direction[3] = 0.3
    (found,) = project(*(ResidualStream(part.half()) for part in parts), chosen(vector("a", 1, direction)))
    assert found.still_from is None


def test_the_dynamics_of_a_still_trajectory_stay_null_when_they_are_recomputed_from_its_file(tmp_path: Path) -> None:
    each, parts = vector("a", 2, torch.randn(WIDTH)), [stream(n).points for n in (5, 30)]
    ablated = [ResidualStream((part - (part @ each.unit)[..., None] * each.unit).half()) for part in parts]
    (projection,) = project(*ablated, chosen(each))
    tokens = {"prompt": {"tokens": ["a"] * 5}, "response": {"tokens": ["a"] * 30}}
    (found,) = projections_to_json([projection])
    metadata = {"vector_source": projection.source(), "means": projection.means()}
    write_json(tmp_path / "1.json", {**tokens, **found, "metadata": metadata})
    again = dynamics_of_file(ProjectionFile.read(tmp_path / "1.json"))
    assert (again.persistence, again.peak_velocity, again.commitment_shift) == (None, 0, 0)


def test_a_vectors_length_does_not_matter() -> None:
    direction = torch.randn(WIDTH)
    short, long = project(stream(4), stream(4), chosen(vector("a", 1, direction), vector("a", 1, direction * 1e4)))
    assert torch.allclose(short.prompt, long.prompt, atol=1e-5)


def test_activations_whose_sum_overflows_have_scores() -> None:
    large = ResidualStream(torch.full((2 * LAYERS + 1, 9, WIDTH), 1e37))
    (found,) = project(large, large, chosen(vector("a", 1, torch.ones(WIDTH))))
    assert torch.allclose(found.prompt, torch.tensor(4e37))


def test_a_centred_projection_states_its_offset_and_the_share_of_massive_dimensions_rounded() -> None:
    found = Centred(-1.23456789, (3, 1), 0.123456).to_json()
    assert found == {"offset": -1.23457, "massive_dimensions": (3, 1), "massive_variance_share": 0.1235}
    assert Centred(0.5, None, None).to_json()["massive_variance_share"] is None
