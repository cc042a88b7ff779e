"""A session of IPython with the embedded model: the examples of docs/ipython.md, and the packaged vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_ipython import TOP, new_session, run_in
from tlcapture import Experiment


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


@pytest.mark.parametrize("has_experiment", [True, False])
def test_the_magic_takes_the_vectors_of_another_experiment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    embedded_root: Path,
    exp: Experiment,
    smollm2: Any,
    capsys: pytest.CaptureFixture[str],
    has_experiment: bool,
) -> None:
    with new_session(tmp_path, monkeypatch, embedded_root, smollm2) as session:
        session.user_ns.update({"exp": exp} if has_experiment else {}, model=smollm2)
        run_in(session, "%load_ext tlcapture")
        run_in(session, '%capture_prompt --vector-experiment packaged -t affect/positivity -n 2 "hi"')
        assert "affect/positivity" in capsys.readouterr().out
        assert session.user_ns["cap"].project("affect/positivity").vector.experiment == "packaged"
