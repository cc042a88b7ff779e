"""The examples of docs/ipython.md run on the embedded model, in a session of IPython."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_ipython import TOP, new_session, run_in


@pytest.mark.filterwarnings("ignore:.*by default")
def test_the_examples_of_the_documentation_run_in_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    embedded_root: Path,
    smollm2: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with new_session(tmp_path, monkeypatch, embedded_root, smollm2) as session:
        blocks = re.findall(r"```(?:python|ipython)\n(.*?)```", (TOP / "docs" / "ipython.md").read_text(), re.DOTALL)
        assert len(blocks) >= 9
        for block in blocks:
            run_in(session, block)
        assert Path("trajectory.html").stat().st_size > 10_000
        printed = capsys.readouterr()
        assert "Error" not in printed.out + printed.err
