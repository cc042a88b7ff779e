"""What is said of vectors that are missing: what there is, and a command that can be run as it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tlcapture.cli.main import main
from tlcapture.errors import TlcaptureError
from tlcapture.explore.experiment_vectors import ExperimentVectors
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.missing_vectors import no_vectors_of_trait
from tlcapture.traits.selection import select
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.packaged import packaged_layout
from tlcapture.traits.vectors import write_vector

TRAIT = Trait("behavioral", "refusal")


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCAPTURE_ROOT", str(tmp_path))


def own(root: Path, *methods: str) -> Layout:
    layout = Layout(root, "exp")
    for method in methods:
        write_vector(VectorFiles(layout, TRAIT), "residual", method, 3, torch.ones(4))
    return layout


def said(layout: Layout, method: str | None = None, component: str = "residual", layer: int | str = "auto") -> str:
    with pytest.raises(TlcaptureError) as caught:
        select(VectorFiles(layout, TRAIT), component, 30, layer=layer, method=method)
    return str(caught.value)


PACKAGED: dict[str, tuple[Callable[[Layout], str], str, str]] = {
    "method": (
        lambda layout: said(layout, "mean_diff"),
        "available methods: probe; extract your own in an",
        "mean_diff",
    ),
    "unknown method": (lambda layout: said(layout, "prob"), "did you mean 'probe'? available methods: probe", ""),
    "component": (lambda layout: said(layout, component="attn_out"), "in the package: extract your own in an", ""),
    "layer": (lambda layout: said(layout, layer=99), "in the package; available layers: probe: 0 to 29", ""),
    "trait": (lambda layout: str(no_vectors_of_trait(layout, Trait("tone", "loud"))), "package; available traits", ""),
}


@pytest.mark.parametrize("case", PACKAGED)
def test_of_the_package_nothing_is_advised_that_needs_an_experiment_called_name(case: str) -> None:
    ask, expected, methods = PACKAGED[case]
    line = ask(packaged_layout())
    assert expected in line and "--experiment" not in line and "NAME" not in line
    assert (f"--methods {methods}" in line) if methods else ("--methods" not in line)


def test_a_missing_method_of_an_experiment_is_extracted_by_its_name(tmp_path: Path) -> None:
    line = said(own(tmp_path, "probe"), "mean_diff")
    assert "for behavioral/refusal in experiment 'exp'; available methods: probe; run 'tlcapture extract" in line
    assert line.endswith("--experiment exp --traits behavioral/refusal --methods mean_diff'")


def test_a_method_that_no_command_extracts_is_not_advised(tmp_path: Path) -> None:
    layout = own(tmp_path, "probe", "mean_diff")
    assert said(layout, "mean_dif").endswith("did you mean 'mean_diff'? available methods: probe, mean_diff")
    assert said(layout, "imported").endswith("; available methods: probe, mean_diff")


@pytest.mark.parametrize("method", [None, "probe", "mean_dif"])
def test_without_any_vectors_extraction_is_advised(method: str | None, tmp_path: Path) -> None:
    line = said(Layout(tmp_path, "exp"), method)
    assert "in experiment 'exp': run 'tlcapture extract --experiment exp --traits behavioral/refusal" in line
    assert ("--methods probe" in line) == (method == "probe")


def test_the_command_names_a_root_that_is_not_the_default(tmp_path: Path) -> None:
    line = said(Layout(tmp_path / "an other", "exp"))
    assert f"run 'tlcapture extract --experiment exp --root '{tmp_path}/an other' --traits behavioral/refusal'" in line


def test_an_experiment_in_the_root_that_is_called_packaged_is_one_s_own(tmp_path: Path) -> None:
    write_vector(VectorFiles(Layout(tmp_path, "packaged"), TRAIT), "residual", "probe", 3, torch.ones(4))
    assert "run 'tlcapture extract --experiment packaged --traits" in said(Layout(tmp_path, "packaged"), "mean_diff")


def test_a_trait_with_vectors_of_another_component_is_not_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(TlcaptureError, match="no attn_out vectors for behavioral/refusal in experiment 'exp': run"):
        ExperimentVectors(own(tmp_path, "probe"), "attn_out")[str(TRAIT)]


def test_the_commands_advised_have_these_options(tmp_path: Path) -> None:
    for line in (said(own(tmp_path, "probe"), "mean_diff"), said(packaged_layout(), "gradient")):
        words = line.rpartition("'tlcapture ")[2].removesuffix("'").split()
        with main.make_context("tlcapture", list(words)) as context:
            command = main.get_command(context, words[0])
            assert command is not None
            command.make_context(words[0], words[1:], parent=context).close()


def test_extracting_a_trait_without_examples_is_not_advised(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    assert "run 'tlcapture extract" in str(no_vectors_of_trait(layout, Trait("style", "formality")))
    line = str(no_vectors_of_trait(layout, Trait("style", "formalit")))
    assert "nor are there examples, in datasets/traits/style/formalit: did you mean 'style/formality'?" in line
    assert "tlcapture extract" not in line
