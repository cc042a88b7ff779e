"""`--dry-run`: it writes nothing, and its estimate is close to the size of what is then written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests import tiny
from tlcapture.generation.loop import teacher_force
from tlcapture.models.sizes import Measures

Run = Callable[..., Result]
EVERYTHING = ("--attention", "--logit-lens", "--layer-internals", 1, "--capture-attn")


def test_a_dry_run_writes_nothing_and_its_estimate_is_close(capture: Run, extract: Run, data: Path) -> None:
    extract()
    before = sorted(path for path in data.rglob("*"))
    dry = capture("--dry-run", "--json", *EVERYTHING)
    assert dry.exit_code == 0
    assert sorted(path for path in data.rglob("*")) == before
    estimate = json.loads(dry.stdout)["estimate"]
    written = json.loads(capture("--json", *EVERYTHING).stdout)["files"]
    assert estimate["files"] == written["count"]
    folders = written["folders"]

    def size(*beginnings: str) -> int:
        return sum(folder["bytes"] for name, folder in folders.items() if name.startswith(beginnings))

    kinds = {kind: row["bytes"] for kind, row in estimate["kinds"].items()}
    assert kinds["raw residual"] == pytest.approx(size("inference/raw/residual"), rel=0.1)
    assert kinds["layer internals"] == pytest.approx(size("inference/raw/internals"), rel=0.15)
    assert kinds["attention"] + kinds["logit lens"] == pytest.approx(size("analysis"), rel=0.25)
    assert kinds["projection"] == pytest.approx(size("inference/tone"), rel=0.5)


def test_a_dry_run_counts_only_missing_files(capture: Run, raw: Path) -> None:
    capture()
    (raw / "2.pt").unlink()
    text = capture("--dry-run", "--skip-existing", "--logit-lens").output
    assert "1 prompts to capture, 2 captures to complete" in text
    assert "logit lens             3 files" in text
    assert "raw residual           1 files" in text


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
