"""The chance level of evaluated vectors, from activations alone."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tlcapture.commands.evaluating import cross_traits
from tlcapture.commands.evaluating import rows as evaluation_rows
from tlcapture.commands.evaluating.entries import Entry, with_entries
from tlcapture.commands.evaluating.rows import EvaluatedComponent, _cosines, rows_of
from tlcapture.extraction.cross_validation import relabelled
from tlcapture.extraction.examples import Examples, read_examples
from tlcapture.extraction.kept_activations import KeptActivations
from tlcapture.extraction.methods import FITS
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_json
from tlcapture.traits.vector_files import IMPORTED, VectorFiles
from tlcapture.traits.vectors import read_vector, write_vector
from tlcapture.traits.verdicts import Doubts, UsedVector

TRAIT = Trait.parse("tone/loud")
N_LAYERS, PAIRS = 2, 15  # of which three are held out


def examples_of(root: Path) -> Examples:
    folder = root / "datasets" / "traits" / str(TRAIT)
    folder.mkdir(parents=True)
    for side in ("positive", "negative"):
        rows = [{"pair": str(n), "prompt": f"say {n}", "response": f"{side} {n}"} for n in range(PAIRS)]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(Datasets(root), TRAIT)


def evaluated(root: Path, vectors: dict[str, Tensor], activations: Tensor) -> tuple[EvaluatedComponent, Examples]:
    """The rows of vectors `[n_layers, d_model]`, given by method, and the examples."""
    examples, layout = examples_of(root), Layout(root, "exp")
    files, n = VectorFiles(layout, TRAIT), len(examples.items)
    for method, of_layers in vectors.items():
        for layer, vector in enumerate(of_layers):
            write_vector(files, "residual", method, layer, vector)
    found = {method: [read_vector(files, "residual", method, layer) for layer in range(N_LAYERS)] for method in vectors}
    kept = KeptActivations(activations, ["same"] * n, [1] * n, "", "", "", "", "response_mean")
    return rows_of(layout, examples, kept, found, 0), examples


def entry(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Entry:
    return Entry.model_validate({"trait": str(TRAIT), "components": {"residual": {"rows": rows, "summary": summary}}})


def noise(seed: int) -> Tensor:
    return torch.randn(N_LAYERS, 2 * PAIRS, 8, generator=torch.Generator().manual_seed(seed))


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    positive, negative = scores[labels], scores[~labels]
    return float(((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)).mean())


def test_imported_vectors_are_compared_with_shuffled_labels_of_the_same_projections(tmp_path: Path) -> None:
    activations, vectors = noise(0), noise(10)[:, 0]
    found, examples = evaluated(tmp_path, {IMPORTED: vectors}, activations)
    held_out = np.array([item.held_out for item in examples.items])
    labels = torch.tensor([item.positive for item in examples.items])
    scores = torch.einsum("lnd,ld->ln", activations, vectors).numpy()[:, held_out]
    drawn = relabelled(labels, examples.groups).numpy()[:, held_out]
    null = [max(area(each, shuffled) for each in scores) for shuffled in drawn]
    expected = pytest.approx(np.quantile(null, 0.95), abs=1e-5)
    assert [row["null_auroc_p95"] for row in found.rows] == [expected] * N_LAYERS


def test_p_counts_labellings_that_separate_exactly_as_well(tmp_path: Path) -> None:
    activations = noise(8)
    examples = examples_of(tmp_path / "same")
    held_out = torch.tensor([item.held_out for item in examples.items])
    labels = torch.tensor([item.positive for item in examples.items])

    def best(sides: Tensor) -> float:
        vectors = FITS["mean_diff"](activations[:, ~held_out], sides[~held_out])
        scores = torch.einsum("lnd,ld->ln", activations, vectors)[:, held_out].numpy()
        return max(area(each, sides[held_out].numpy()) for each in scores)

    own, null = best(labels), np.array([best(each) for each in relabelled(labels, examples.groups)])
    assert own == pytest.approx(8 / 9)  # 0.888889 in the file, which is larger
    assert (np.abs(null - own) < 1e-6).any()
    vectors = FITS["mean_diff"](activations[:, ~held_out], labels[~held_out])
    found, _ = evaluated(tmp_path, {"mean_diff": vectors}, activations)
    assert found.summary["p"] == pytest.approx((1 + (null >= own - 1e-6).sum()) / 201, abs=1e-6)


def test_the_nested_score_of_extracted_vectors_is_not_that_of_an_imported_one(tmp_path: Path) -> None:
    common = {"trait": str(TRAIT), "layer": 0, "component": "residual"}
    rows = [{**common, "method": each, "val_effect_size": size} for each, size in (("probe", 1.0), (IMPORTED, 2.0))]
    found = entry(rows, {"nested_auroc": 0.9, "verdict": "adds +0.100 AUROC"})
    best = with_entries(Layout(tmp_path, "exp"), [found])["best_vectors"][str(TRAIT)]
    assert best["method"] == IMPORTED
    assert "nested_auroc" not in best and "verdict" not in best


def test_a_verdict_on_extracted_vectors_is_no_doubt_about_an_imported_one(tmp_path: Path) -> None:
    layout, common = Layout(tmp_path, "exp"), {"trait": str(TRAIT), "layer": 0, "component": "residual"}
    rows = [{**common, "method": each, "val_effect_size": size} for each, size in (("probe", 2.0), (IMPORTED, 1.0))]
    summary = {
        "p": 0.5,
        "gain_interval": [-0.1, 0.1],
        "verdict": "no better than vectors of shuffled labels (p = 0.50)",
    }
    write_json(layout.evaluation, with_entries(layout, [entry(rows, summary)]))
    vectors = [UsedVector(str(TRAIT), "residual", each, 0, "exp") for each in ("probe", IMPORTED)]
    assert [Doubts(tmp_path).of(each) is None for each in vectors] == [False, True]
    layout.evaluation.write_text("{")
    assert str(Doubts(tmp_path).of(vectors[0])).endswith("cannot be read")


def test_each_vector_is_read_once_for_all_traits_that_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, traits = Layout(tmp_path, "exp"), [Trait("style", f"t{number}") for number in range(6)]
    for number, trait in enumerate(traits):
        for layer in range(N_LAYERS):
            write_vector(VectorFiles(layout, trait), "residual", "probe", layer, torch.randn(8) + number)
    read: list[Trait] = []
    reads = evaluation_rows.read_vector
    monkeypatch.setattr(
        evaluation_rows, "read_vector", lambda files, *which: read.append(files.trait) or reads(files, *which)
    )

    def cosines(trait: Trait, layer: int) -> dict[str, float | None]:
        others = [(str(each), each, "probe") for each in traits if each != trait]
        return _cosines(reads(VectorFiles(layout, trait), "residual", "probe", layer), others, layout)

    found = {(trait, layer): cosines(trait, layer) for trait in traits for layer in range(N_LAYERS)}
    assert len(read) == len(traits) * N_LAYERS
    one, other = traits[:2]
    assert found[one, 1][str(other)] == found[other, 1][str(one)] != found[one, 0][str(other)]
    write_vector(VectorFiles(layout, other), "residual", "probe", 1, torch.ones(8))
    assert cosines(one, 1)[str(other)] != found[one, 1][str(other)]
    assert read[-1] == other and len(read) == len(traits) * N_LAYERS + 1


def test_the_activations_of_one_trait_at_a_time_are_read_for_its_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, examples = Layout(tmp_path, "exp"), examples_of(tmp_path)
    for number in range(5):
        layout.vectors(Trait("style", f"t{number}")).mkdir(parents=True)
    alive: list[weakref.ref[KeptActivations]] = []
    most = 0

    def read(*where: object) -> tuple[Examples, KeptActivations]:
        nonlocal most
        kept = KeptActivations(noise(len(alive)), [], [], "", "", "", "f", "")
        alive.append(weakref.ref(kept))
        most = max(most, sum(each() is not None for each in alive))
        return examples, kept

    vector = SimpleNamespace(layer=1, vector=torch.ones(8), metadata={"model_fingerprint": "f"})
    monkeypatch.setattr(cross_traits, "_examples", read)
    monkeypatch.setattr(cross_traits, "_best_vectors", lambda layout: {Trait("style", "t0"): vector})
    found = cross_traits.cross_traits(layout)
    assert list(found.aurocs["style/t0"]) == [f"style/t{number}" for number in range(5)]
    assert (len(alive), most) == (5, 2)  # the last one and this one
