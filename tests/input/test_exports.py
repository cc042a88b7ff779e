"""Exports whose files hold something else than an export does: refused in one line that names the export."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.page.conftest import TOKENS, TRAIT, projection
from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.exchange import parquet
from tlcapture.exchange.exported import BULK, ExportedCapture, restore
from tlcapture.exchange.single_files import read_single_files
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.vector_sources.exported import restore_vectors

NOTE = {"id": "0123456789ab", "prompt_set": "odd", "name": "1", "start": 0, "stop": 1, "tokens": ["<bos>"], "text": "a",
        "revision": 1, "created": "now", "updated": "now"}  # fmt: skip
ODD = [None, "x", [[1]]]
# Words of Python and of pydantic, which say nothing to a user.
FOREIGN = re.compile(r"NoneType|' object|subscriptable|attribute|iterable|Input should|required|validation error|\n")


def content() -> dict[str, Any]:
    found = projection(1)
    rows = [*found["projections"]["prompt"], *found["projections"]["response"]]
    without = {**found, "projections": None}
    for part in ("prompt", "response"):
        without[part] = {**found[part], "tokens": None}
    record = {
        "prompt_set": "odd", "file": "1", "prompt": "a", "response": "b", "n_prompt_tokens": 2, "n_tokens": len(TOKENS),
        "spans": [], "capture": None, "notes": [NOTE],
        "projections": [{"trait": TRAIT, "component": "residual", "content": without}],
    }  # fmt: skip
    return copy.deepcopy({"record": record, "columns": {"token": TOKENS, TRAIT: rows}, "activations": {}})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def changed(path: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    whole = {"whole": content()}
    at: Any = whole
    for key in ("whole", *path)[:-1]:
        at = at[key]
    change(at, ("whole", *path)[-1])
    return whole.get("whole")


def variants() -> Iterator[tuple[str, Any]]:
    for path in [each for each in places(content()) if len(each) < 5]:
        for odd in ODD:
            yield f"{path}: {odd}", changed(path, lambda at, key, odd=odd: at.__setitem__(key, odd))  # type: ignore[misc]
        if path and isinstance(path[-1], str):
            yield f"{path}: left out", changed(path, lambda at, key: at.pop(key))


def imported(folder: Path, to: Path, value: Any) -> None:
    path = folder / "captures" / "odd" / "1.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    for exported in read_single_files(folder, ".json"):
        restore(Layout(to, "exp"), exported, folder)


def test_a_file_of_an_export_of_another_form_is_named_in_plain_words(tmp_path: Path) -> None:
    imported(tmp_path / "export", tmp_path, content())
    assert Layout(tmp_path, "exp").projection_folders("odd")
    said = {}
    for name, value in variants():
        try:
            imported(tmp_path / "export", tmp_path, value)
        except TlcaptureError as error:
            said[name] = str(error)
    assert len(said) > 40
    assert {name: line for name, line in said.items() if FOREIGN.search(line) or len(line) > 500} == {}


@pytest.mark.parametrize("name", ["tone/loud", "residual_reference"])
def test_vectors_of_an_export_of_another_form_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "vectors" / f"{name}.safetensors"
    path.parent.mkdir(parents=True)
    for data in (
        b"",
        b"{}",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x30\0\0\0\0\0\0\0" + b'{"__metadata__":{"tlcapture":"[1, 2]"}}'.ljust(48),
    ):
        path.write_bytes(data)
        with pytest.raises(StorageError, match=f"{path.name}: not a valid file of exported vectors: "):
            restore_vectors(Layout(tmp_path, "exp"), tmp_path)


def test_the_tables_of_many_captures_are_written_and_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BUFFERED", 2**15)
    monkeypatch.setattr(parquet, "_READ", 2**14)
    batches, sizes = parquet._batches, []

    def counted(path: Path) -> Iterator[Any]:
        for batch in batches(path):
            sizes.append((path.parent.name, batch.nbytes))
            yield batch

    monkeypatch.setattr(parquet, "_batches", counted)
    folder = parquet.ParquetFolder(tmp_path, parquet.Columns((TRAIT,), ()), 10**9)
    most, scores, random = 0, [], Random(0).random
    for number in range(60):
        whole = content()
        whole["record"]["file"] = str(number)
        rows = [[[value + random() for value in at] for at in token] for token in whole["columns"][TRAIT]]
        scores.append(rows)
        columns = {**dict.fromkeys(BULK, [0] * len(TOKENS)), "token": TOKENS, TRAIT: rows}
        columns |= {name: ["x"] * len(TOKENS) for name in ("part", "span", "role")}
        folder.add(ExportedCapture(whole["record"], columns))
        most = max(most, sum(table.nbytes for _, table in folder._waiting))
    folder.close()
    assert most < 2**15
    found = list(parquet.read_parquet(tmp_path))
    assert [each.record["file"] for each in found] == [str(number) for number in range(60)]
    assert [each.columns[TRAIT] for each in found] == scores
    assert {name for name, _ in sizes} == {"captures", "tokens"}
    assert max(size for _, size in sizes) < 2 * 2**14 and len(sizes) > 8
