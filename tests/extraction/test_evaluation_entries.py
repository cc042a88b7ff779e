"""What `evaluate` finds of each trait is kept at once, and the evaluation of all is written a few times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tlcapture.commands.evaluating import entries as evaluation_entries
from tlcapture.commands.evaluating.entries import Entry, add_entry, entries_put_in, with_entries
from tlcapture.names import Trait
from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, write_json
from tlcapture.traits.evaluation_files import Evaluation
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import write_vector


def entry(trait: str, size: float = 1.0, digest: str | None = None) -> dict[str, Any]:
    row = {"trait": trait, "method": "probe", "layer": 1, "component": "residual", "val_effect_size": size, "n_val": 4}
    row |= {} if digest is None else {"vector_digest": digest}
    return {"trait": trait, "components": {"residual": {"rows": [row], "summary": {"nested_auroc": 0.75}}}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.silent(Layout(tmp_path, "exp"))


@pytest.fixture
def written(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the evaluation each time that it was written."""
    sizes: list[int] = []

    def counted(path: Path, *how: Any, **more: Any) -> Any:
        found = write_json(path, *how, **more)
        if path == run.layout.evaluation:
            sizes.append(path.stat().st_size)
        return found

    monkeypatch.setattr(evaluation_entries, "write_json", counted)
    return sizes


def left(run: Run) -> list[Path]:
    return sorted((run.layout.folder / "extraction").glob(".evaluated/*"))


def test_the_evaluation_of_many_traits_is_written_a_few_times(run: Run, written: list[int]) -> None:
    traits = [f"style/t{number}" for number in range(60)]
    with entries_put_in(run):
        for number, trait in enumerate(traits):
            add_entry(run, entry(trait, float(number)))
    assert 2 <= len(written) <= 8 and sum(written) < 4 * written[-1]
    assert not left(run) and not (run.layout.folder / "extraction" / ".evaluated").exists()
    content = read_json(run.layout.evaluation)
    one_by_one = Run.silent(Layout(run.layout.root, "other"))
    for number, trait in enumerate(traits):
        write_json(
            one_by_one.layout.evaluation,
            with_entries(one_by_one.layout, [Entry.model_validate(entry(trait, float(number)))]),
            indent=True,
        )
    assert content == read_json(one_by_one.layout.evaluation)
    assert content["best_vectors"]["style/t7"]["nested_auroc"] == 0.75
    with entries_put_in(run):
        pass
    assert len(written) <= 8  # nothing was new


def test_a_run_that_stops_or_is_killed_loses_no_trait(run: Run, written: list[int]) -> None:
    def stopped() -> None:
        with entries_put_in(run):
            for trait in ("style/a", "style/b"):
                add_entry(run, entry(trait))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert sorted(Evaluation.read(run.layout.evaluation).rows_of) == ["style/a", "style/b"]
    add_entry(run, entry("style/c"))
    assert len(left(run)) == 1  # of a run that was killed here
    with entries_put_in(run):
        assert sorted(Evaluation.read(run.layout.evaluation).rows_of) == ["style/a", "style/b", "style/c"]
        add_entry(run, {"trait": "style/a", "carry_over": {"essays": [{"method": "probe", "layer": 1, "auroc": 0.5}]}})
        add_entry(run, entry("style/b", 2.0))
    found = Evaluation.read(run.layout.evaluation)
    assert [row.val_effect_size for row in found.all_results] == [1.0, 2.0, 1.0]
    assert list(found.carry_over_to("essays")) == ["style/a"]


def test_what_a_killed_run_found_of_vectors_that_are_gone_is_left_out(run: Run) -> None:
    files = VectorFiles(run.layout, Trait.parse("style/a"))
    write_vector(files, "residual", "probe", 1, torch.ones(4))
    with entries_put_in(run):
        add_entry(run, entry("style/b"))
    add_entry(run, entry("style/a", digest=files.digest("residual", "probe", 1)))
    write_vector(files, "residual", "probe", 1, torch.ones(4) * 2)
    with entries_put_in(run):
        pass
    assert list(Evaluation.read(run.layout.evaluation).rows_of) == ["style/b"] and not left(run)
