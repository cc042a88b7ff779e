"""Damaged files through the commands: exit status 1 or 2, and the file named in an error of one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from tests.cli.conftest import make_prompt_set
from tests.evidence import Evidence
from tests.input import captures
from tests.input.strategies import some_of_each
from tests.page.conftest import attention, logit_lens, projection, write
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import write_vector

Run = Callable[..., Result]
TRAIT = Trait("style", "odd")

DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an array": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "UTF-16": lambda path: path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16")),
    "bytes that are not text": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
    "deep nesting": lambda path: path.write_text("[" * 100_000),
    "NaN": lambda path: path.write_text('{"baseline": {"trait_mean": NaN}}'),
    "1e999": lambda path: path.write_text('{"a": 1e999}'),
    "a number of 5000 digits": lambda path: path.write_text('{"tokens": ' + "9" * 5000 + "}"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.fixture
def layout(root: Path) -> Layout:
    """An experiment with handmade files, without a model."""
    made = Layout(root, "exp")
    make_prompt_set(root, "odd", ["hello"])
    write(made.config, {"inference_model": "smollm2", "extraction_model": "smollm2"})
    folder = VectorFiles(made, TRAIT)
    for layer in (0, 1):
        write_vector(folder, "residual", "probe", layer, torch.ones(captures.WIDTH))
    folder.write_metadata("residual", {"extraction_model": "tiny", "methods": ["probe"], "layers": [0, 1]})
    raw = made.residual("odd", "1")
    raw.parent.mkdir(parents=True)
    torch.save(captures.content(), raw)
    rows = [{"trait": str(TRAIT), "method": "probe", "layer": 1, "val_effect_size": 1.0, "val_auroc": 0.9}]
    write(made.evaluation, {"all_results": rows})
    run = {"config": {"layers": [1], "methods": ["probe"]}, "result": {"trait_mean": 60.0, "coherence_mean": 60.0}}
    write(made.steering(TRAIT), {"baseline": {"trait_mean": 50.0}, "runs": [run]})
    write(made.projection(TRAIT, "residual", "odd", "1"), projection(1))
    write(made.attention("odd", "1"), attention())
    write(made.logit_lens("odd", "1"), logit_lens())
    return made


EXP = ("--experiment", "exp")
PROJECT = ("project", *EXP, "--prompt-set", "odd")
COMMANDS: dict[str, tuple[Callable[[Layout], Path], list[tuple[str, ...]]]] = {
    "prompt set": (
        lambda layout: layout.root / "datasets" / "inference" / "odd.json",
        [("capture", *EXP, "--prompt-set", "odd")],
    ),
    "config.json": (lambda layout: layout.config, [("capture", *EXP, "--prompt", "x")]),
    "capture": (lambda layout: layout.residual("odd", "1"), [PROJECT]),
    "vector": (lambda layout: VectorFiles(layout, TRAIT).file("residual", "probe", 1), [PROJECT]),
    "metadata of vectors": (
        lambda layout: VectorFiles(layout, TRAIT).metadata_file("residual"),
        [PROJECT, ("traits", "list", *EXP)],
    ),
    "extraction_evaluation.json": (
        lambda layout: layout.evaluation,
        [PROJECT, ("traits", "list", *EXP), ("evaluate", *EXP, "--against-steering")],
    ),
    "steering results": (
        lambda layout: layout.steering(TRAIT),
        [PROJECT, ("traits", "list", *EXP), ("evaluate", *EXP, "--against-steering")],
    ),
    "projection file": (
        lambda layout: layout.projection(TRAIT, "residual", "odd", "1"),
        [(*PROJECT, "--dynamics-only"), ("view", *EXP, "--png", "pictures")],
    ),
    "attention file": (lambda layout: layout.attention("odd", "1"), [("view", *EXP, "--export", "page.html")]),
    "logit-lens file": (lambda layout: layout.logit_lens("odd", "1"), [("view", *EXP, "--export", "page.html")]),
}


def test_the_commands_succeed_on_valid_files(tlcapture: Run, layout: Layout, tmp_path: Path) -> None:
    for name, (_, commands) in COMMANDS.items():
        for words in commands:
            if words[0] != "capture":
                result = tlcapture(*_in_folder(words, tmp_path))
                assert result.exit_code == (1 if "--against-steering" in words else 0) or _nothing_to_compare(result), (
                    name,
                    result.output,
                )


def _nothing_to_compare(result: Result) -> bool:
    return result.exit_code == 2 and "no trait has effect sizes and steering results" in result.stderr


def _in_folder(words: tuple[str, ...], folder: Path) -> list[Any]:
    return [folder / "out" / word if word in ("pictures", "page.html") else word for word in words]


# `test_json_files` covers the readers on all kinds of damage; these tests cover the commands.
@pytest.mark.parametrize(("reader", "damage"), some_of_each(COMMANDS, DAMAGES, 3))
def test_a_damaged_file_is_named_in_an_error_of_one_line(
    tlcapture: Run, layout: Layout, tmp_path: Path, evidence: Evidence, reader: str, damage: str
) -> None:
    file_of, commands = COMMANDS[reader]
    path = file_of(layout)
    DAMAGES[damage](path)
    for words in commands:
        result = tlcapture(*_in_folder(words, tmp_path))
        assert result.exit_code in (1, 2), result.output
        lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, result.stderr
        assert str(path) in lines[0] or any(text in lines[0] for text in _ABSENT.get(reader, ())), lines
        assert "Traceback" not in result.output
        evidence.tried(f"{reader}, by command", damage)


# Files that are found by listing a folder: one that is not a regular file counts as missing.
_ABSENT = {
    "prompt set": ["no prompt set 'odd': looked for "],
    "vector": ["no residual vector of style/odd by 'probe' at layer 1"],
    "projection file": ["no projection to recompute the dynamics of", "has no residual projections"],
}


def test_an_extra_field_that_is_nested_too_deeply_for_the_page_is_reported(
    tlcapture: Run, layout: Layout, tmp_path: Path, evidence: Evidence
) -> None:
    nested = '{"further": ' + "[" * 900 + "]" * 900 + "}"
    VectorFiles(layout, TRAIT).metadata_file("residual").write_text(nested)
    result = tlcapture("view", *EXP, "--export", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "exp/vectors/style/odd: a file has content that cannot be shown" in result.stderr
    evidence.tried("metadata of vectors, by command", "deep nesting")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"val_effect_size": "3"}, "val_effect_size"),
        ({"val_effect_size": True}, "val_effect_size"),
        ({"layer": 3.7}, "layer"),
        ({"layer": -1}, "layer"),
        ({"layer": 10**15}, "layer"),
        ({"val_auroc": 1.5}, "val_auroc"),
        ({"trait": "../x"}, "trait"),
    ],
)
def test_an_invalid_row_of_an_evaluation_is_an_error(
    tlcapture: Run, layout: Layout, evidence: Evidence, change: dict[str, Any], field: str
) -> None:
    row = {"trait": str(TRAIT), "method": "probe", "layer": 1, "val_effect_size": 1.0, "val_auroc": 0.9, **change}
    write(layout.evaluation, {"all_results": [row]})
    result = tlcapture(*PROJECT)
    assert result.exit_code == 1
    assert f"{layout.evaluation}: not a valid evaluation file: all_results[0].{field}: " in result.stderr
    evidence.tried("extraction_evaluation.json, by command", "wrong types")


@pytest.mark.parametrize(
    ("part", "change", "field"),
    [
        ("result", {"trait_mean": 1e300}, "runs[0].result.trait_mean"),
        ("result", {"coherence_mean": "90"}, "runs[0].result.coherence_mean"),
        ("result", {"coherence_mean": None}, "runs[0].result.coherence_mean"),
        ("config", {"layers": [1.0]}, "runs[0].config.layers[0]"),
        ("config", {"layers": [-1]}, "runs[0].config.layers[0]"),
        ("config", {"methods": []}, "runs[0].config.methods"),
    ],
)
def test_an_invalid_steering_run_is_an_error(
    tlcapture: Run, layout: Layout, evidence: Evidence, part: str, change: dict[str, Any], field: str
) -> None:
    content = json.loads(layout.steering(TRAIT).read_text())
    content["runs"][0][part] |= change
    write(layout.steering(TRAIT), content)
    result = tlcapture(*PROJECT)
    assert result.exit_code == 1
    assert f"{layout.steering(TRAIT)}: not a valid steering results file: {field}: " in result.stderr
    evidence.tried("steering results, by command", "wrong types")
