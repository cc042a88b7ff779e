"""The options of docs/sharing.md are those of `tlcapture export`, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.stored_experiments import make_experiment
from tests.tiny import ENGINES
from tlcapture.cli.export import export
from tlcapture.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text()


def test_the_page_names_every_option_of_its_own() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    own = {name for option in export.params for name in option.opts if name.startswith("--")}
    assert own - {"--experiment", "--root", "--verbose", "--quiet", "--log-file", "--json", "--fsync"} <= named


def test_the_examples_run(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_experiment(tmp_path, tiny_folder, ENGINES[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [line.split()[1:] for line in PAGE.splitlines() if line.startswith("    tlcapture ")]
    assert [line[0] for line in lines] == ["export", "export", "import"]
    for line in lines:
        words = [{"my_exp": "exp", "single_trait": "short", "12,16": "1,2"}.get(word, word) for word in line]
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(example, names)
    assert names["tokens"]["token"]
    assert len(names["captures"]) == 1
