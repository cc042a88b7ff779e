"""Choosing the vectors that a capture is projected onto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.choice import ChosenVectors, VectorChoice, VectorChooser, choose_vectors
from tlcapture.traits.statistics.dynamics import dynamics
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import write_vector
from tlcapture.views.kept_points import KeptPoints

WIDTH = 4
FITS, WIDE, ATTENTION = Trait("a", "fits"), Trait("a", "wide"), Trait("a", "attention")


@dataclass(frozen=True)
class Model:
    """What is known of a capture before its prompt has run."""

    n_layers: int = 20
    d_model: int = WIDTH
    layers: tuple[int, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=lambda: {"inference_model": "tiny"})

    @property
    def kept(self) -> KeptPoints:
        return KeptPoints.of(self.n_layers, self.layers)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path, "exp")
    write_vector(VectorFiles(made, FITS), "residual", "probe", 16, torch.ones(WIDTH))
    write_vector(VectorFiles(made, WIDE), "residual", "probe", 16, torch.ones(WIDTH + 1))
    write_vector(VectorFiles(made, ATTENTION), "attn_out", "probe", 3, torch.ones(WIDTH))
    return made


def traits_of(chosen: ChosenVectors) -> list[Trait]:
    return [each.vector.trait for each in chosen.vectors]


def test_one_trait_that_fails_leaves_the_vectors_of_the_others(layout: Layout) -> None:
    chosen = choose_vectors(layout, VectorChoice(), Model(), "residual")
    assert traits_of(chosen) == [FITS]
    ((trait, error),) = chosen.failures
    assert trait == WIDE and "has width 5, but the activations have width 4" in str(error)


def test_a_trait_without_the_component_is_left_out_unless_it_is_named(layout: Layout) -> None:
    assert traits_of(choose_vectors(layout, VectorChoice(), Model(), "attn_out")) == [ATTENTION]
    chosen = choose_vectors(layout, VectorChoice(traits=(FITS, ATTENTION)), Model(), "attn_out")
    assert traits_of(chosen) == [ATTENTION]
    ((trait, error),) = chosen.failures
    assert trait == FITS and "no attn_out vectors for a/fits" in str(error)


def test_a_trait_that_is_named_twice_is_chosen_once(layout: Layout) -> None:
    assert traits_of(choose_vectors(layout, VectorChoice(traits=(FITS, FITS)), Model(), "residual")) == [FITS]


def test_missing_vectors_are_an_error_only_where_they_are_asked_for(layout: Layout) -> None:
    empty = Layout(layout.root, "empty")
    assert not choose_vectors(empty, VectorChoice(), Model(), "residual").vectors
    with pytest.raises(InputError, match="experiment 'empty' has no trait vectors: run 'tlcapture extract"):
        choose_vectors(empty, VectorChoice(experiment="empty"), Model(), "residual")
    with pytest.raises(InputError, match=r"no vectors for trait 'a/b' .*available traits: a/attention, a/fits, a/wide"):
        choose_vectors(layout, VectorChoice(traits=(Trait("a", "b"),)), Model(), "residual")


def test_of_a_misspelt_trait_the_meant_one_is_named_and_no_extraction_advised(layout: Layout) -> None:
    with pytest.raises(InputError, match=r"no vectors for trait 'a/fit' in .*: did you mean 'a/fits'\?") as raised:
        choose_vectors(layout, VectorChoice(traits=(Trait("a", "fit"),)), Model(), "residual")
    assert "tlcapture extract" not in str(raised.value) and "a/attention, a/fits" in str(raised.value)


def test_a_vector_and_its_dynamics_are_shown_without_their_numbers(layout: Layout) -> None:
    vector = choose_vectors(layout, VectorChoice(traits=(FITS,)), Model(), "residual").vectors[0].vector
    assert "tensor" not in repr(vector) and "layer=16" in repr(vector)
    shown = repr(dynamics(torch.arange(40.0), 10))
    assert "persistence=" in shown and "tensor" not in shown


def test_another_model_is_noted_unless_its_experiment_was_named(layout: Layout) -> None:
    files = VectorFiles(layout, FITS)
    files.write_metadata(
        "residual", {"extraction_model": "other", "methods": ["probe"], "layers": [16], "hidden_dim": WIDTH}
    )
    notes = [
        choose_vectors(layout, choice, Model(), "residual").vectors[0].notes(Model().metadata)
        for choice in (VectorChoice(), VectorChoice(experiment="exp"))
    ]
    assert "'other'" in notes[0][0] and notes[1] == []


def test_captures_of_one_shape_and_origin_share_a_choice_that_is_reported_once(layout: Layout) -> None:
    reported: list[ChosenVectors] = []
    chooser = VectorChooser(layout, VectorChoice(), on_chosen=reported.append)
    first = chooser.vectors(Model(), "residual")
    assert chooser.vectors(Model(), "residual") is first
    assert len(reported) == 1 and len(reported[0].failures) == 1
    chooser.vectors(Model(n_layers=24), "residual")
    assert len(reported) == 2


def test_of_vectors_that_nobody_asked_for_only_those_of_layers_that_were_not_kept_are_left_out(layout: Layout) -> None:
    write_vector(VectorFiles(layout, Trait("a", "late")), "residual", "probe", 17, torch.ones(WIDTH))
    chosen = choose_vectors(layout, VectorChoice(leaves_out_others=True), Model(layers=(16,)), "residual")
    assert traits_of(chosen) == [FITS] and [trait for trait, _ in chosen.failures] == [WIDE]
    assert chosen.warning is not None
    assert "1 of 2 packaged vectors left out, since residual_out of their layer 17 was not kept" in chosen.warning
    assert "--layers 16,17" in chosen.warning
    few = choose_vectors(layout, VectorChoice(leaves_out_others=True), Model(layers=(3,)), "residual")
    assert few.warning is not None and "their layers 16, 17 was not kept" in few.warning


def test_a_vector_that_cannot_match_the_captured_activations_fails(layout: Layout) -> None:
    facts = {"extraction_model": "tiny", "methods": ["probe"], "layers": [16], "hidden_dim": WIDTH}
    VectorFiles(layout, FITS).write_metadata("residual", {**facts, "component": "attn_out"})
    chosen = choose_vectors(layout, VectorChoice(traits=(FITS,)), Model(), "residual")
    ((trait, error),) = chosen.failures
    assert trait == FITS and "recorded as a vector of attn_out, not of residual" in str(error)
