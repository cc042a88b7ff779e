"""Contrastive examples: errors name the file and line, and all examples that are read can be checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.evidence import Evidence
from tests.input.strategies import Damaged, check_refusal, damaged_json, try_all
from tlcapture.errors import InputError, TlcaptureError
from tlcapture.extraction.example_checks import check_examples
from tlcapture.extraction.examples import read_examples
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets

ODD = Trait("style", "odd")
ROWS = [{"pair": str(n), "prompt": f"say {n}", "response": f"word {n}"} for n in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "datasets" / "traits" / "style" / "odd"
    made.mkdir(parents=True)
    lines = "".join(json.dumps({**row, "response": "other"}) + "\n" for row in ROWS)
    (made / "negative.jsonl").write_text(lines)
    return made


def one_line(file: Damaged) -> Damaged:
    """A file of valid lines and one damaged line, with the newlines of the damaged line removed."""
    good = [json.dumps(row).encode() for row in ROWS]
    return Damaged(file.kind, b"\n".join([*good[:2], file.data.replace(b"\n", b" "), *good[2:]]))


def test_damaged_json_lines_are_refused_or_read_correctly(folder: Path, evidence: Evidence, tmp_path: Path) -> None:
    path = folder / "positive.jsonl"

    def check(file: Damaged) -> None:
        one_line(file).put(path)
        try:
            found = read_examples(Datasets(tmp_path), ODD)
        except TlcaptureError as error:
            check_refusal(error, path)
            return
        rows = [json.loads(line) for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
        kept = [item.example.model_dump(exclude_unset=True) for item in found.items if item.positive]
        assert kept == rows
        assert all(type(value) in (str, type(None)) for row in rows for value in row.values())

    try_all(evidence, "examples, JSON lines", damaged_json(ROWS[0]), check, examples=200)


def test_damaged_plain_text_is_refused_or_read_correctly(folder: Path, evidence: Evidence, tmp_path: Path) -> None:
    path = folder / "positive.txt"
    bytes_of = st.binary(max_size=30).map(lambda data: Damaged("any bytes", data))
    texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), max_size=8)
    lines = texts.map(lambda found: Damaged("any text", "\n".join(found).encode()))
    odd = [b"", b"\n" * 100, b"\xff\xfea\0", b"\xef\xbb\xbfa\nb\nc\nd", b"a\r\nb\r\nc\r\nd\r\n", b"\0\n" * 9]
    other = st.sampled_from(odd).map(lambda data: Damaged("odd files", data))

    def check(file: Damaged) -> None:
        file.put(path)
        try:
            found = read_examples(Datasets(tmp_path), ODD)
        except TlcaptureError as error:
            check_refusal(error, path, folder)
            return
        own = [line.strip() for line in file.data.decode("utf-8-sig").split("\n")]
        assert [item.example.text for item in found.items if item.positive] == [line for line in own if line]

    try_all(evidence, "examples, plain text", bytes_of | lines | other, check, 200)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "!!!"}] * 6,
        [{"pair": "1", "text": f"a {n}"} for n in range(6)],
        [{"text": f"{n}"} for n in range(6)],
        [{"prompt": "?"}] * 4,
        [{"pair": "\x1b[2J", "prompt": "\0", "response": "\0"}] * 4,
        [{"text": "\u6f22 \U0001f600"}] * 5,
    ],
)
def test_examples_without_words_or_pairs_can_be_checked(
    folder: Path, tmp_path: Path, evidence: Evidence, rows: list[dict[str, str]]
) -> None:
    for side in ("positive", "negative"):
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = check_examples([read_examples(Datasets(tmp_path), ODD)])
    assert all(cue.auroc is None or 0 <= cue.auroc <= 1 for cue in found.cues.values())
    assert all(cue.in_pairs is None or 0 <= cue.in_pairs <= 1 for cue in found.cues.values())
    evidence.tried("examples, JSON lines", "no words, no pairs")


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", sorted(NOT_FILES))
def test_a_path_that_is_not_a_regular_file_is_named(
    folder: Path, tmp_path: Path, evidence: Evidence, what: str
) -> None:
    NOT_FILES[what](folder / "positive.jsonl")
    with pytest.raises(InputError, match=r"no positive\.jsonl") as caught:
        read_examples(Datasets(tmp_path), ODD)
    check_refusal(caught.value, folder)
    evidence.tried("examples, JSON lines", "no file")
