"""Commands print whatever they are given to print on: full disks, pipes that nobody reads, old encodings, nothing."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import make_data
from tlcapture.cli.main import main


def printed_on(stream: io.TextIOWrapper | None, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of `tlcapture WORDS` with a stream as its standard output, which is put back at the end."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        assert sys.stdout is stream
    return int(ended.value.code or 0)


@pytest.fixture
def nobody_reads() -> Iterator[io.TextIOWrapper]:
    reading, writing = os.pipe()
    os.close(reading)
    yield io.TextIOWrapper(io.FileIO(writing, "w", closefd=False))  # type: ignore[type-var]
    os.close(writing)


def test_a_pipe_that_nobody_reads_ends_a_command_silently(
    nobody_reads: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed_on(nobody_reads, monkeypatch, "--help") == 1
    assert capsys.readouterr().err == ""


def test_a_full_disk_under_the_output_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        assert printed_on(full, monkeypatch, "--help") == 1
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


def test_without_any_output_a_command_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed_on(None, monkeypatch, "--help") == 0


def test_characters_that_an_encoding_lacks_are_replaced(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(root)
    path = tmp_path / "printed"
    with path.open("w", encoding="latin-1") as old:
        assert printed_on(old, monkeypatch, "list", "--root", str(tmp_path / "日本")) == 2
        (tmp_path / "日本").mkdir()
        assert printed_on(old, monkeypatch, "list", "--root", str(tmp_path / "日本")) == 0
    assert "no experiments in " in path.read_text("latin-1")
