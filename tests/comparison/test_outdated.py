"""Comparisons of captures that were made again since, which their own experiment does not remove."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.input.captures import content
from tlcapture.commands.compare import CompareOptions, run_compare
from tlcapture.commands.comparing.compared_sets import CaptureSet, compared_sets
from tlcapture.commands.comparing.summary import SavedComparisons
from tlcapture.page.contents import Contents
from tlcapture.page.missing import MissingError
from tlcapture.storage.experiments.comparisons import comparison_file
from tlcapture.storage.experiments.layout import Layout

LATER = 2 * 10**18  # nanoseconds since the epoch


def write_capture(root: Path, where: str, *, later: bool = False, tokens: tuple[str, ...] = (), **own: Any) -> None:
    """A capture of prompt 1 in `EXPERIMENT/SET[@VARIANT]`, whose response begins with `tokens`."""
    experiment, _, name = where.partition("/")
    value = content()
    value["metadata"] |= own
    if "@" in name:
        value["metadata"]["variant"] = name.partition("@")[2]
    value["response"]["tokens"][: len(tokens)] = tokens
    path = Layout(root, experiment).residual(name, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    if later:
        os.utime(path, ns=(LATER, LATER))


@pytest.fixture(params=["other/odd", "exp/odd@formal"])
def b(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Captures that those of the set `odd` of `exp` are compared with: of another experiment, or a variant."""
    for where in ("exp/odd", request.param):
        write_capture(tmp_path, where)
    compare(tmp_path, request.param)
    return str(request.param)


def compare(root: Path, b: str) -> None:
    sets = compared_sets(CaptureSet.parse(root, "exp/odd"), CaptureSet.parse(root, b))
    assert run_compare(sets, CompareOptions(kl=False)).n_prompts == 1


def found(root: Path, b: str) -> SavedComparisons:
    return SavedComparisons(Layout(root, "exp"), other_of(b), "odd")


def other_of(b: str) -> str:
    return b.replace("/odd", "")


@pytest.mark.parametrize("change", [{"model_fingerprint": "g"}, {"tokens": ("u",)}, {"dtype": "bfloat16"}])
def test_captures_made_again_are_noticed(tmp_path: Path, b: str, change: dict[str, Any]) -> None:
    write_capture(tmp_path, b, later=True, **change)
    summary = found(tmp_path, b).summary()
    assert (summary.n_files, summary.outdated) == (0, ["1"])
    assert summary.left_out == "left out: 1 comparison of captures that were made again since (1)"
    where = ("exp", other_of(b), "odd")
    for ask in (lambda: Contents(tmp_path).compared_set(*where), lambda: Contents(tmp_path).comparison(*where, "1")):
        with pytest.raises(MissingError, match="made again since") as caught:
            ask()
        assert caught.value.command == f"tlcapture compare exp/odd {b} --root {tmp_path}"


def test_captures_that_are_the_same_again_or_gone_leave_comparisons_current(tmp_path: Path, b: str) -> None:
    for where in ("exp/odd", b):
        write_capture(tmp_path, where, later=True)
    assert found(tmp_path, b).summary().names == ["1"]
    assert Contents(tmp_path).compared_set("exp", other_of(b), "odd")["n_outdated"] == 0
    experiment, _, name = b.partition("/")
    shutil.rmtree(Layout(tmp_path, experiment).residual(name, 1).parent)
    assert found(tmp_path, b).summary().names == ["1"]


def test_those_that_are_outdated_are_left_out_in_one_line(tmp_path: Path, b: str) -> None:
    for number, later in ((2, True), (3, False)):
        for where in ("exp/odd", b):
            source = Layout(tmp_path, where.partition("/")[0]).residual(where.partition("/")[2], 1)
            value = torch.load(source)
            value["metadata"]["prompt_id"] = str(number)
            torch.save(value, source.with_name(f"{number}.pt"))
        path = comparison_file(Layout(tmp_path, "exp"), other_of(b), "odd", "1")
        shutil.copy(path, path.with_name(f"{number}.json"))
        if later:
            value["metadata"]["model_fingerprint"] = "g"
            torch.save(value, source.with_name(f"{number}.pt"))
            os.utime(source.with_name(f"{number}.pt"), ns=(LATER, LATER))
    content = Contents(tmp_path).compared_set("exp", other_of(b), "odd")
    assert (content["n_files"], content["n_outdated"], content["ids"]) == (2, 1, ["1", "3", "2"])
    command = f"tlcapture compare exp/odd {b} --root {tmp_path}"
    assert content["problems"] == [
        f"left out: 1 comparison of captures that were made again since (2): run '{command}'"
    ]
