"""The vectors that come with the package: of the shipped traits, for the embedded model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open

from tests import tiny
from tlcapture import Experiment
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.page.contents import Contents
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json
from tlcapture.traits.missing_vectors import no_vectors_of_trait
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.statistics.reference import read_reference
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.packaged import packaged_files
from tlcapture.traits.vectors import read_vector

COMMAND = ["capture", "--prompt", "How do tides work?", "--max-new-tokens", "12", "--temperature", "0"]
PROJECTED_ONTO_PACKAGED = "default: no trait vectors of its own: projected onto those that come with the package"
Command = Callable[..., Result]

pytestmark = pytest.mark.skipif(tiny.ENGINES[0] != "hooked", reason="they were extracted with TransformerLens 3")


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The root after the first command of all, and what it printed."""
    from click.testing import CliRunner

    from tlcapture.cli.main import main

    root = tmp_path_factory.mktemp("first")
    return root, CliRunner().invoke(main, [*COMMAND, "--root", str(root)], catch_exceptions=False)


def _projections(root: Path) -> list[ProjectionFile]:
    paths = sorted((root / "experiments" / "default").glob("inference/*/*/residual_stream/adhoc/1.json"))
    return [ProjectionFile.read(path) for path in paths]


def test_the_page_shows_them_with_their_evaluation(captured: tuple[Path, Result]) -> None:
    found = Contents(captured[0]).vectors("default", "style", "formality")
    assert (found["source"], found["components"]["residual"]["selected"]["layer"]) == ("packaged", 12)
    assert found["evaluation"]["trait"]["verdict"]
    assert found["steering"]["missing"]["command"].startswith(
        "tlcapture extract --experiment default --traits style/formality"
    )


def test_the_first_capture_is_projected_onto_all_shipped_traits(captured: tuple[Path, Result]) -> None:
    root, result = captured
    assert result.exit_code == 0
    assert result.output.count(PROJECTED_ONTO_PACKAGED) == 1
    found = _projections(root)
    sources = [each.metadata.vector_source for each in found]
    assert len(found) == len(Datasets(root).traits()) == 10
    assert {each.experiment for each in sources} == {"packaged"}
    assert {each.selected_by for each in sources} == {"effect_size"}
    assert all(each.calibration and each.metadata.chance and not each.metadata.chance.is_isotropic for each in found)
    assert not Layout(root, "default").traits()
    assert "warning" not in result.output


def test_scores_are_dot_products_with_the_packaged_files(captured: tuple[Path, Result]) -> None:
    root, _ = captured
    residual = Capture.open(Layout(root, "default").residual("adhoc", "1")).response.residual
    for trait, content in zip(Datasets(root).traits(), _projections(root), strict=True):
        source = content.metadata.vector_source
        path = packaged_files() / "vectors" / trait.category / f"{trait.name}.safetensors"
        with safe_open(path, framework="pt") as file:
            vector = file.get_tensor(f"residual/{source.method}/{source.layer}").double()
        last = residual.points[2 * source.layer + 2].double()
        expected = last @ (vector / vector.norm())
        assert torch.allclose(torch.tensor(content.trajectory[1]).double(), expected, rtol=1e-3, atol=1e-3)


def test_other_commands_take_them_too(captured: tuple[Path, Result], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from tlcapture.cli.main import main

    root, _ = captured
    before = [each.trajectory for each in _projections(root)]
    result = CliRunner().invoke(main, ["project", "--root", str(root), "--prompt-set", "adhoc"])
    assert (result.exit_code, result.output.count(PROJECTED_ONTO_PACKAGED)) == (0, 1)
    assert [each.trajectory for each in _projections(root)] == before
    result = CliRunner().invoke(main, ["traits", "list", "--root", str(root)])
    assert (result.exit_code, result.output.count("effect_size")) == (0, 10)
    cap = Experiment("default", root).captures("adhoc")["1"]
    assert len(cap.projected()) == 10


@pytest.mark.parametrize(
    ("options", "left_out", "remedy"),
    [
        (["--layers", "12"], "9 of 10 packaged vectors left out", "capture with --layers 12,14,16,17,18,19,21"),
        (["--points", "residual_in"], "10 of 10 packaged", "capture with --points residual_in,residual_out"),
    ],
)
def test_those_whose_activations_are_not_kept_are_left_out(
    tmp_path: Path, options: list[str], left_out: str, remedy: str
) -> None:
    from click.testing import CliRunner

    from tlcapture.cli.main import main

    arguments = ["capture", "--root", str(tmp_path), "--prompt", "Hi", "--max-new-tokens", "1", *options]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output.count(left_out)) == (0, 1)
    assert remedy in result.output
    assert "failed" not in result.output

    named = CliRunner().invoke(main, ["project", "--root", str(tmp_path), "--prompt-set", "adhoc", "--layer", "14"])
    assert named.exit_code == 1
    assert "failed: affect/empathy" in named.output


def test_vectors_of_its_own_and_the_roots_come_first(captured: tuple[Path, Result], tmp_path: Path) -> None:
    from tlcapture.traits.choice import VectorChoice
    from tlcapture.traits.vector_sources.packaged import vectors_layout
    from tlcapture.traits.vectors import write_vector

    own = Layout(tmp_path, "own")
    assert VectorChoice().or_packaged(own, "smollm2").is_fallback
    assert not VectorChoice().or_packaged(own, "another").is_fallback
    assert vectors_layout(tmp_path, "packaged").root != tmp_path
    write_vector(VectorFiles(own, Datasets(tmp_path).traits()[0]), "residual", "probe", 3, torch.ones(576))
    assert not VectorChoice().or_packaged(own, "smollm2").is_fallback
    (tmp_path / "experiments" / "packaged").mkdir()
    assert vectors_layout(tmp_path, "packaged").root == tmp_path


def test_they_are_an_experiment_in_python_that_nothing_is_saved_into(tmp_path: Path, smollm2: Any) -> None:
    import tlcapture as library

    packaged = Experiment("packaged", tmp_path)
    trait = "style/formality"
    assert len(packaged.traits) == 10 and packaged.vectors[trait].tensors[16].shape == (576,)
    steer = library.Steer(trait, 0.3, 16)
    asked = {"max_new_tokens": 2, "temperature": 0, "vectors": packaged}
    (cap,) = library.capture(smollm2, "hi", interventions=[steer], **asked)
    with pytest.raises(InputError, match="save into an experiment of your own"):
        cap.save(packaged)
    (plain,) = library.capture(smollm2, "hi", **asked)
    saved = plain.save(tmp_path / "experiments" / "mine")
    assert saved.project(trait).vector.experiment == "packaged"
    assert not (tmp_path / "experiments" / "packaged").exists()


def test_a_model_with_other_weights_is_not_projected_onto_them(captured: tuple[Path, Result], tmp_path: Path) -> None:
    from dataclasses import replace

    from tlcapture.traits.choice import VectorChoice, choose_vectors

    layout = Layout(captured[0], "default")
    capture = Capture.open(layout.residual("adhoc", "1"))
    choice = VectorChoice().or_packaged(layout, "smollm2")
    assert len(choose_vectors(choice.layout(layout), choice, capture, "residual").vectors) == 10
    other = replace(capture, metadata={**capture.metadata, "model_fingerprint": "0" * 16})
    assert not choose_vectors(choice.layout(layout), choice, other, "residual").vectors


def test_without_projection_none_are_unpacked(root: Path, tlcapture: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr("tlcapture.traits.vector_sources.packaged.packaged_layout", refuse)
    result = tlcapture(*COMMAND, "--no-project")
    assert result.exit_code == 0
    assert PROJECTED_ONTO_PACKAGED not in result.output
    assert not _projections(root)


def test_a_trait_extracted_again_has_the_packaged_vectors(root: Path, tlcapture: Command) -> None:
    """Of the shipped examples, on another machine: they differ by rounding alone."""
    grid = ("--methods", "probe", "--component", "residual", "--layers", "2,12,29")
    result = tlcapture("extract", "--traits", "style/formality", *grid)
    assert result.exit_code == 0
    trait = next(each for each in Datasets(root).traits() if each.name == "formality")
    files = VectorFiles(Layout(root, "default"), trait)
    path = packaged_files() / "vectors" / "style" / "formality.safetensors"
    with safe_open(path, framework="pt") as file:
        packaged = torch.stack([file.get_tensor(f"residual/probe/{layer}") for layer in (2, 12, 29)])
    again = torch.stack([read_vector(files, "residual", "probe", layer).vector for layer in (2, 12, 29)])
    assert torch.cosine_similarity(again, packaged, dim=1).min() > 0.999


def test_what_comes_with_the_package_is_whole() -> None:
    evaluation = read_json(packaged_files() / "evaluation.json")
    assert len(evaluation["all_results"]) == 10 * 30
    vectors = list(packaged_files().glob("vectors/*/*.safetensors"))
    assert len(vectors) == 10
    assert sum(path.stat().st_size for path in vectors) < 1.2e6
    from tlcapture.traits.vector_sources.packaged import packaged_layout

    reference = read_reference(packaged_layout(), "residual")
    assert reference is not None
    assert reference.fits(30, 576)
    for trait in packaged_layout().traits():
        norms = VectorFiles(packaged_layout(), trait).metadata("residual", "probe")["typical_norms"]
        assert len(norms) == 30 and min(norms) > 0  # the unit of --steer


def test_captures_of_an_experiment_without_vectors_are_compared_on_the_packaged_ones(
    captured: tuple[Path, Result], tlcapture: Command
) -> None:
    root, _ = captured
    words = ["compare", "default", "default", "--root", str(root), "--no-kl"]
    result = tlcapture(*words)
    assert result.exit_code == 0
    assert PROJECTED_ONTO_PACKAGED in result.output
    path = root / "experiments/default/analysis/compare/default/adhoc/1.json"
    traits = read_json(path)["traits"]
    assert len(traits) == 10
    assert {each["experiment"] for each in traits.values()} == {"packaged"}
    assert all(value == 0 for each in traits.values() for value in each["difference"])
    assert "1 prompt skipped" in tlcapture(*words, "--skip-existing").output
    asked = tlcapture(*words, "--vector-experiment", "packaged", "--traits", "style/formality")
    assert asked.exit_code == 0
    assert PROJECTED_ONTO_PACKAGED not in asked.output
    frame = Experiment("default", root).compare("default", "adhoc", kl=False)
    assert set(frame["trait"]) == set(traits)


def test_a_missing_trait_that_comes_with_the_package_is_offered_from_there(
    captured: tuple[Path, Result], tmp_path: Path, tlcapture: Command
) -> None:
    root, _ = captured
    layout = Layout(tmp_path, "own")
    (layout.folder / "extraction").mkdir(parents=True)
    layout.config.write_text((root / "experiments/default/config.json").read_text())
    offered = "or take those that come with the package, vector experiment 'packaged'"
    for trait, expected in (("cognitive/retrieval", True), ("cognitive/none", False)):
        assert (offered in str(no_vectors_of_trait(layout, Trait.parse(trait)))) == expected
    with pytest.raises(InputError, match=r"come with the package, Experiment\('packaged'\)\.vectors"):
        Experiment("own", tmp_path).vectors["cognitive/retrieval"]
    layout.config.write_text("{}")
    assert offered not in str(no_vectors_of_trait(layout, Trait.parse("cognitive/retrieval")))


def test_a_comparison_takes_them_too_and_says_so(captured: tuple[Path, Result], tlcapture: Command) -> None:
    root, _ = captured
    steered = ("--responses-from", "default", "--steer", "style/formality:+0.2@12", "--variant", "formal")
    assert tlcapture("capture", *steered, "--root", root, "--vector-experiment", "packaged").exit_code == 0
    compared = tlcapture("compare", "default/adhoc", "default/adhoc@formal", "--no-kl", "--root", root)
    assert compared.exit_code == 0, compared.output
    assert PROJECTED_ONTO_PACKAGED in compared.stdout
    traits = [line.split()[0] for line in compared.stdout.splitlines() if re.match(r"\w+/\w+ +[+-]", line)]
    assert traits == list(map(str, Datasets(root).traits()))
    assert compared.stdout.splitlines()[-1].startswith("next: tlcapture view")
    again = tlcapture("compare", "default/adhoc", "default/adhoc@formal", "--no-kl", "--root", root, "--skip-existing")
    assert again.exit_code == 0 and "wrote 0 files" in again.stdout
