"""An experiment of the embedded model, created once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.conftest import loading_once
from tlcapture import Experiment
from tlcapture.cli.main import main


def copy_shortest_pairs(shipped: Path, folder: Path) -> None:
    """Copy the eight pairs of examples that are read most quickly: the fewest of which two are held out."""
    names = ("positive.jsonl", "negative.jsonl")
    pairs = zip(*((shipped / name).read_text(encoding="utf-8").splitlines() for name in names), strict=True)
    shortest = sorted(pairs, key=lambda pair: sum(map(len, pair)))[:8]
    folder.mkdir(parents=True)
    for name, lines in zip(names, zip(*shortest, strict=True), strict=True):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="package", autouse=True)
def _load_the_model_once() -> Iterator[None]:
    """Commands load the embedded model once for each set of options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcapture.models.loading.load_model", loading_once("smollm2"))
        yield


@pytest.fixture(scope="session")
def embedded_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of the embedded model with vectors of two traits and two captures."""
    root = tmp_path_factory.mktemp("root")
    for trait in ("behavioral/refusal", "style/formality"):
        copy_shortest_pairs(Path("datasets/traits") / trait, root / "datasets" / "traits" / trait)
    common = ["--experiment", "exp", "--root", str(root)]
    traits = ["--traits", "behavioral/refusal,style/formality"]
    for words in (
        ["extract", *common, *traits, "--methods", "mean_diff"],
        ["capture", *common, "--prompt-set", "single_trait", "--limit", "2", "--max-new-tokens", "8",
         "--save-dtype", "float32", "--capture-attn", "--attention", "--logit-lens"],
    ):  # fmt: skip
        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def exp(embedded_root: Path, smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    found = Experiment("exp", embedded_root)
    monkeypatch.setitem(found.__dict__, "model", smollm2)  # loaded once for all tests
    return found
