"""`--dry-run`: it writes nothing, and its estimate is close to the size of what is then written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests import tiny
from tlcapture.generation.loop import teacher_force
from tlcapture.models.sizes import Measures

Run = Callable[..., Result]
EVERYTHING = ("--attention", "--logit-lens", "--layer-internals", 1, "--capture-attn")
SUBSET = ("--layers", 1, "--points", "residual_out", "--layer", 1, "--save-dtype", "float32")
# Where the files of a kind are, and how far from their size the estimate may be.
FOLDERS = {
    ("raw residual",): ("inference/raw/residual", 0.1),
    ("layer internals",): ("inference/raw/internals", 0.15),
    ("attention", "logit lens"): ("analysis", 0.25),
    ("projection",): ("inference/tone", 0.35),
}


@pytest.mark.parametrize(
    ("options", "raw_may_differ_by"), [(EVERYTHING, 0.1), (SUBSET, 0.35), (("--projections-only",), 0.1)]
)
def test_a_dry_run_writes_nothing_and_its_estimate_is_close(
    capture: Run, extract: Run, data: Path, options: tuple[object, ...], raw_may_differ_by: float
) -> None:
    extract()
    before = sorted(path for path in data.rglob("*"))
    dry = capture("--dry-run", "--json", *options)
    assert dry.exit_code == 0
    assert sorted(path for path in data.rglob("*")) == before
    estimate = json.loads(dry.stdout)["estimate"]
    written = json.loads(capture("--json", *options).stdout)["files"]
    assert estimate["files"] == written["count"]
    assert estimate["bytes"] == sum(row["bytes"] for row in estimate["kinds"].values())
    estimated = {kind: row["bytes"] for kind, row in estimate["kinds"].items()}
    for kinds, (beginning, far) in FOLDERS.items():
        size = sum(each["bytes"] for name, each in written["folders"].items() if name.startswith(beginning))
        assert (size == 0) == estimated.keys().isdisjoint(kinds)
        may_differ_by = raw_may_differ_by if kinds == ("raw residual",) else far
        assert sum(estimated.get(kind, 0) for kind in kinds) == pytest.approx(size, rel=may_differ_by)
    left = json.loads(capture("--dry-run", "--json", "--skip-existing", *options).stdout)["estimate"]
    assert (left["files"], left["bytes"]) == (0, 0)


def test_a_dry_run_counts_only_missing_files(capture: Run, raw: Path) -> None:
    capture()
    (raw / "2.pt").unlink()
    text = capture("--dry-run", "--skip-existing", "--logit-lens").output
    assert "1 prompt to capture, 2 captures to complete" in text
    assert "logit lens    3 files" in text
    assert "raw residual   1 file" in text


def test_a_dry_run_counts_the_projections_that_captures_lack(capture: Run, extract: Run, data: Path) -> None:
    extract()
    capture("--capture-attn", "--no-project")
    for form in ((), ("--format", "compact")):
        words = ("--capture-attn", "--skip-existing", "--json", *form)
        estimate = json.loads(capture(*words, "--dry-run").stdout)["estimate"]
        written = json.loads(capture(*words).stdout)["files"]
        assert (estimate["prompts"], estimate["completed"]) == (0, 3)
        assert estimate["files"] == (6 if form else 12)
        is_kept = [row for row in written["list"] if "/+/" not in row[0]]  # shards are put together afterwards
        assert estimate["files"] == len(is_kept)
        assert estimate["bytes"] == pytest.approx(sum(size for _, size in is_kept), rel=0.35)
        assert json.loads(capture(*words, "--dry-run").stdout)["estimate"]["files"] == 0
        shutil.rmtree(data / "experiments/exp/inference/tone", ignore_errors=True)


def test_a_dry_run_names_the_vectors_that_do_not_fit(capture: Run, extract: Run, data: Path) -> None:
    extract("--component", "residual", "--layers", "1")
    words = ("--layers", "0", "--json")
    dry, done = (json.loads(capture(*words, *more).stdout) for more in (("--dry-run",), ()))
    assert [each["what"] for each in dry["estimate"]["failures"]] == ["tone/loud", "tone/warm"]
    assert dry["estimate"]["failures"] == done["failures"]
    assert dry["estimate"]["files"] == done["files"]["count"] == 3
    for more in (("--dry-run",), ()):
        refused = capture(*words, "--projections-only", "--variant", "v", *more)
        assert refused.exit_code == 2 and "loading" not in refused.output
        assert "no trait has a vector that fits, so nothing would be kept: the probe vector of " in refused.stderr


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_measures_of_a_config_are_those_of_the_loaded_model(name: str, engine: str) -> None:
    model = tiny.model(name, engine)
    measures = Measures.of(tiny.hf_model(name).config)
    assert measures == model.measures
    hooks = ["blocks.0.mlp.hook_post", "blocks.0.attn.hook_k"]
    post, keys = teacher_force(model, [4, 5], hooks).values()
    assert post.shape[-1] == measures.d_mlp
    assert keys.shape[-2:] == (measures.n_key_value_heads, measures.d_head)
