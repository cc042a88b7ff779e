"""What a worker of a cluster is sent: pieces with their own prompts alone, and what has to fit in its memory."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.cli.conftest import make_prompt_set
from tlcapture.cluster.actor import Shared, WorkerActor
from tlcapture.cluster.executor import RayExecutor
from tlcapture.commands.capturing import memory_need
from tlcapture.runs.executors import LocalExecutor, Work

Run = Callable[..., Result]
GREEDY = ("--temperature", 0)
FEW, MANY = 8, 96


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The work of each command that is given to a cluster, which does nothing of it."""
    found: list[Work] = []
    monkeypatch.setattr(RayExecutor, "run", lambda self, work, run: found.append(work))
    return found


def sizes_of_pieces(work: Work) -> list[int]:
    return [len(pickle.dumps(piece)) for piece in work.pieces(4)]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ((), ("capture", *GREEDY)),
        (("capture", *GREEDY), ("capture", *GREEDY, "--attention", "--replay")),
        (("capture", *GREEDY), ("project",)),
        ((), ("capture", *GREEDY, "--steer", "tone/loud:+0.5@1", "--vector-experiment", "without-norms")),
    ],
    ids=["fresh", "saved", "project", "norms-of-the-set"],
)  # fmt: skip
def test_a_piece_of_work_is_as_large_for_a_hundred_prompts_as_for_a_few(
    tlcapture: Run, extract: Run, data: Path, tiny_folder: Path, works: list[Work], before: Any, words: Any
) -> None:
    if "project" in words or "--steer" in words:
        extract()
        shutil.copytree(data / "experiments" / "exp", data / "experiments" / "without-norms")
        remove_norms(data / "experiments" / "without-norms")
    for name, count in (("few", FEW), ("many", MANY)):
        make_prompt_set(data, name, [f"say 5{number:03d}" for number in range(count)])
        common = ("--experiment", "exp", "--prompt-set", name)
        of_model = ("--model", tiny_folder, "--max-new-tokens", 1)
        if before:
            done = tlcapture(*before, *common, *of_model, "--batch-size", 32)
            assert done.exit_code == 0, done.output
        options = of_model if words[0] == "capture" else ()
        tlcapture(*words, *common, *options, "--executor", "ray")
    few, many = (sizes_of_pieces(work) for work in works)
    assert len(many) == len(few) * MANY / FEW
    assert max(many) < 1.1 * max(few)
    if words[0] == "capture" and not before:
        whole = works[1].pieces(4)
        assert not any(b"say 5095" in pickle.dumps(piece) for piece in whole[:-1])
    if "--steer" in words:  # sent once, with the options
        assert b"say 5095" in pickle.dumps(works[1].make)


def test_norms_that_are_measured_on_the_whole_set_are_the_same_in_pieces(
    capture: Run, extract: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract()
    remove_norms(data / "experiments" / "exp")
    steered = (*GREEDY, "--batch-size", 1, "--steer", "tone/loud:+0.5@1", "--no-project")
    whole = json.loads(capture(*steered, "--variant", "whole", "--json").stdout)
    monkeypatch.setattr(RayExecutor, "run", in_pieces)
    assert capture(*steered, "--variant", "pieces", "--executor", "ray").exit_code == 0
    assert whole["prompts"] == 3
    folder = data / "experiments" / "exp" / "inference" / "raw" / "residual"
    norms = [norms_in(folder / f"short@{name}") for name in ("whole", "pieces")]
    assert norms[0] == norms[1] and len(norms[0]) == 3


def remove_norms(experiment: Path) -> None:
    for path in experiment.rglob("vectors/metadata.json"):
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps({name: value for name, value in content.items() if name != "typical_norms"}))


def norms_in(folder: Path) -> list[Any]:
    import torch

    return [torch.load(path)["metadata"]["interventions"] for path in sorted(folder.glob("*.pt"))]


def in_pieces(self: RayExecutor, work: Work, run: Any) -> None:
    from dataclasses import replace

    LocalExecutor().run(replace(work, tasks=work.pieces(1)), run)


@pytest.mark.parametrize("words", [("--attention",), ("--attention", "--format", "json"), ("--attention", "--replay")])
def test_a_worker_refuses_what_does_not_fit_in_the_memory_of_its_node(
    capture: Run, data: Path, works: list[Work], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """As a local run does, with the same words; the driver's memory does not matter."""
    if "--replay" in words:
        assert capture(*GREEDY).exit_code == 0
    free = 10_000
    monkeypatch.setattr(memory_need, "free_memory", lambda device: free)
    local = capture(*GREEDY, *words)
    assert local.exit_code == 2
    assert "tokens would take about" in local.stderr
    assert capture(*GREEDY, *words, "--executor", "ray").exit_code == 0
    assert "would fail" not in capture(*GREEDY, *words, "--executor", "ray", "--dry-run").output
    (work,) = works
    for name in ("TLCAPTURE_WRITERS", "TLCAPTURE_PROCESSES"):
        monkeypatch.setenv(name, "0")  # so that what the worker sets is undone
    worker, shared = WorkerActor(), [Shared.of(work, layout_of(data), data, 1, collect=False)]
    monkeypatch.setattr(worker, "_check_root", lambda: None)
    refused = worker.prepare(shared, {})
    assert f"error: {refused.error}" == local.stderr.splitlines()[-1]
    assert refused.error is not None and refused.error.exit_code == 2
    free = 2**40
    assert worker.prepare(shared, {}).error is None


@pytest.mark.parametrize("command", ["capture", "extract", "evaluate", "steer", "project", "compare"])
def test_the_help_says_what_a_worker_takes_by_default(tlcapture: Run, command: str) -> None:
    shown = " ".join(tlcapture(command, "--help").output.split())
    assert "[default: 1, or --n-devices, where the cluster has GPUs]" in shown
    assert "[default: as many as fit]" in shown


def layout_of(root: Path) -> Any:
    from tlcapture.storage.experiments.layout import Layout

    return Layout(root, "exp")
