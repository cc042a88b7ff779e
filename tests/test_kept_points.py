"""Which layers and points a capture keeps: their rows in a buffer, and errors for all others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import InputError, StorageError
from tlcapture.text import as_ranges
from tlcapture.views.hooks import POINTS
from tlcapture.views.kept_points import KeptPoints

N_LAYERS = 5
layers = st.sets(st.integers(0, N_LAYERS - 1), min_size=1)
points = st.sets(st.sampled_from(POINTS), min_size=1)


@given(layers, points)
def test_every_kept_point_has_a_row_and_only_equal_activations_share_one(layers: set[int], points: set[str]) -> None:
    kept = KeptPoints.of(N_LAYERS, layers, points)
    rows = {(layer, point): kept.row(layer, point) for layer in layers for point in points}
    assert set(rows.values()) == set(range(len(kept.point_indices)))
    for one, other in ((a, b) for a in rows for b in rows if a < b):
        same = one[0] + 1 == other[0] and (one[1], other[1]) == ("residual_out", "residual_in")
        assert (rows[one] == rows[other]) == same


def test_a_whole_model_has_two_points_per_layer_and_one_more() -> None:
    assert KeptPoints.of(N_LAYERS).point_indices == tuple(range(2 * N_LAYERS + 1))


@given(layers, points, layers, points)
def test_one_includes_another_exactly_if_it_keeps_all_its_rows(
    layers: set[int], points: set[str], more_layers: set[int], more_points: set[str]
) -> None:
    one, other = KeptPoints.of(N_LAYERS, layers, points), KeptPoints.of(N_LAYERS, more_layers, more_points)
    wanted = {(layer, point) for layer in more_layers for point in more_points}
    assert one.includes(other) == (wanted <= {(layer, point) for layer in layers for point in points})


def test_a_point_that_is_not_kept_is_an_error_naming_those_that_are() -> None:
    kept = KeptPoints.of(N_LAYERS, (3, 1), ("residual_out",))
    with pytest.raises(InputError, match=r"layer 2 was not kept: the capture has residual_out of layers 1, 3; capture"):
        kept.row(2, "residual_out")
    with pytest.raises(InputError, match="after_attn was not kept: the capture has residual_out of layers 1, 3"):
        kept.row(1, "after_attn")
    with pytest.raises(InputError, match="no layer 9: the model has layers 0 to 4"):
        kept.row(9, "residual_out")
    with pytest.raises(InputError, match="no residual point 'nix': choose one of"):
        kept.row(1, "nix")


def test_a_layer_that_the_model_does_not_have_cannot_be_kept() -> None:
    with pytest.raises(InputError, match="--layers 5: the model has layers 0 to 4"):
        KeptPoints.of(N_LAYERS, (1, 5))


def test_a_file_whose_metadata_disagrees_is_an_error() -> None:
    assert KeptPoints.of_file({"n_layers": 2}, (0, 1), POINTS).is_all
    with pytest.raises(StorageError, match=r"it holds .* of layer 0, but its metadata states .* of layers 0, 1"):
        KeptPoints.of_file({"n_layers": 2}, (0,), POINTS)
    with pytest.raises(StorageError, match="it holds residual_out of layer 1, but its metadata states residual_in"):
        KeptPoints.of_file({"n_layers": 2, "layers": [1], "points": ["residual_in"]}, (1,), ["residual_out"])


def test_layers_are_listed_as_ranges() -> None:
    assert [as_ranges(layers) for layers in ((), (3,), (0, 1), (2, 3, 4), (1, 5))] == [
        "none",
        "3",
        "0, 1",
        "2 to 4",
        "1, 5",
    ]
