"""Notes on captures: kept whole, by several writers, refused to other sites, and carried by exports."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from tests.cli.conftest import capture, data  # noqa: F401  fixtures
from tests.page.conftest import HOSTILE, TOKENS, write
from tests.page.test_export import carried
from tlcapture.captures.notes import Marked, add_note, change_note, note_of, read_notes, remove_note
from tlcapture.captures.notes import NoteChangedError as ChangedError
from tlcapture.cli.main import main
from tlcapture.errors import InputError, StorageError
from tlcapture.explore.experiment import Experiment
from tlcapture.page.contents import Contents
from tlcapture.page.export import export_page
from tlcapture.page.server import page_app
from tlcapture.storage.experiments.layout import Layout

HOST = "http://127.0.0.1:8765"
PATH = "/api/exp/sets/odd/1/notes"
OWN = {"Origin": HOST}


@pytest.fixture
def client(page_root: Path) -> TestClient:
    return TestClient(page_app(page_root), base_url=HOST)


@pytest.fixture
def layout(page_root: Path) -> Layout:
    return Layout(page_root, "exp")


def on(start: int, stop: int) -> Marked:
    return Marked.of(TOKENS, start, stop)


def texts(layout: Layout, name: str = "1") -> list[str]:
    return [note.text for note in read_notes(layout, "odd", name).notes]


def test_a_note_is_made_changed_and_removed(layout: Layout) -> None:
    later = add_note(layout, "odd", "1", on(3, 5), " spans two ")
    first = add_note(layout, "odd", "1", on(1, 2), HOSTILE)
    assert texts(layout) == [HOSTILE, "spans two"]
    assert (later.tokens, later.revision) == (TOKENS[3:5], 1)
    changed = change_note(layout, later, "other words")
    assert (changed.revision, changed.created, changed.id) == (2, later.created, later.id)
    remove_note(layout, first)
    assert texts(layout) == ["other words"]
    assert texts(layout, "2") == []
    path = layout.folder / "notes" / "odd" / f"1_{later.id}.json"
    assert json.loads(path.read_text()) == {
        "format_version": 1, "id": later.id, "prompt_set": "odd", "name": "1", "start": 3, "stop": 5,
        "tokens": TOKENS[3:5], "text": "other words", "revision": 2, "created": later.created,
        "updated": changed.updated,
    }  # fmt: skip


def test_writers_at_the_same_time_lose_no_note(layout: Layout) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add_note(layout, "odd", "1", on(n % 4, n % 4 + 1), f"note {n}"), range(40)))
    assert sorted(texts(layout)) == sorted(f"note {n}" for n in range(40))


def test_of_two_changes_of_a_note_the_second_is_refused_and_told_why(layout: Layout) -> None:
    note = add_note(layout, "odd", "1", on(1, 2), "as it was")

    def change(n: int) -> bool:
        try:
            change_note(layout, note, f"by {n}")
        except ChangedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(change, range(8))) == 1
    with pytest.raises(ChangedError, match="changed this note"):
        remove_note(layout, note)
    remove_note(layout, note_of(layout, "odd", "1", note.id, 2))
    with pytest.raises(ChangedError, match="removed this note"):
        change_note(layout, note, "too late")


@pytest.mark.parametrize("text", ["", "  \n", "x" * 10_001, "half \ud83c"])
def test_an_empty_or_too_long_note_is_refused(layout: Layout, text: str) -> None:
    with pytest.raises(InputError, match=r"expected 1 to 10,000|not valid Unicode"):
        add_note(layout, "odd", "1", on(1, 2), text)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 2), (3, 2), (0, 99), (99, None)])
def test_tokens_that_the_capture_does_not_have_are_refused(start: int, stop: int | None) -> None:
    with pytest.raises(InputError, match="expected some of the tokens 0 to 5"):
        Marked.of(TOKENS, start, stop)


def test_a_damaged_note_is_named_and_the_others_are_shown(layout: Layout, page_root: Path) -> None:
    add_note(layout, "odd", "1", on(1, 2), "whole")
    write(layout.folder / "notes/odd/1_0123456789ab.json", {"format_version": 1, "text": "no tokens"})
    (layout.folder / "notes/odd/1_other.json").write_text("not a note's name")
    found = Contents(page_root).notes("exp", "odd", "1")
    assert [note["text"] for note in found["notes"]] == ["whole"]
    (problem,) = found["problems"]
    assert problem.startswith("experiments/exp/notes/odd/1_0123456789ab.json: not a valid note file: ")


def test_notes_on_other_tokens_say_so(layout: Layout, page_root: Path) -> None:
    add_note(layout, "odd", "1", on(1, 2), "still there")
    add_note(layout, "odd", "1", Marked(2, 3, ["gone"]), "of an earlier capture")
    assert [note["is_current"] for note in Contents(page_root).notes("exp", "odd", "1")["notes"]] == [True, False]
    assert Contents(page_root).prompt_set("exp", "odd")["prompts"][0]["notes"] == 2


# -- the server -----------------------------------------------------------------------------------


def test_the_page_makes_changes_and_removes_notes(client: TestClient, layout: Layout) -> None:
    made = client.post(PATH, json={"start": 2, "stop": 4, "text": "here"}, headers=OWN)
    assert made.status_code == 200, made.text
    note = made.json()
    changed = client.put(f"{PATH}/{note['id']}", json={"revision": 1, "text": "there"}, headers=OWN)
    assert changed.json()["text"] == "there"
    assert client.get(PATH).json()["notes"] == [{**changed.json(), "is_current": True}]
    again = client.put(f"{PATH}/{note['id']}", json={"revision": 1, "text": "elsewhere"}, headers=OWN)
    assert (again.status_code, "changed this note" in again.json()["what"]) == (409, True)
    assert client.put(f"{PATH}/{note['id']}", json={"revision": 2}, headers=OWN).json() == {}
    assert texts(layout) == []


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "null"}, {"Origin": "http://evil.example"}, {"Origin": "http://127.0.0.1:9999"},
     {"Origin": "https://127.0.0.1:8765"}, {"Origin": "http://127.0.0.1:8765.evil.example"}],
)  # fmt: skip
def test_requests_of_other_sites_are_refused(client: TestClient, layout: Layout, headers: dict[str, str]) -> None:
    note = add_note(layout, "odd", "1", on(1, 2), "as it was")
    new = {"start": 2, "stop": 4, "text": "here"}
    for answer in (
        client.post(PATH, json=new, headers=headers),
        client.put(f"{PATH}/{note.id}", json={"revision": 1}, headers=headers),
    ):
        assert (answer.status_code, answer.json()["what"]) == (403, "refused: only this page itself may change notes")
    form = client.post(PATH, content=json.dumps(new), headers={**OWN, "Content-Type": "text/plain"})
    assert form.status_code == 415
    assert (
        client.options(PATH, headers={"Origin": "http://evil.example"}).headers.get("access-control-allow-origin")
        is None
    )
    assert texts(layout) == ["as it was"]


@pytest.mark.parametrize(
    ("sent", "status", "expected"),
    [
        ({"start": 2, "stop": 99, "text": "x"}, 404, "expected some of the tokens 0 to 5"),
        ({"start": "2", "stop": 3, "text": "x"}, 404, "not a valid note: start"),
        ({"start": 2, "stop": 3}, 404, "not a valid note: text"),
        ({"start": 2, "stop": 3, "text": " "}, 404, "expected 1 to 10,000"),
        ([], 404, "not a valid note"),
        ({"start": 2, "stop": 3, "text": "x" * 200_000}, 413, "more than"),
    ],
)
def test_what_is_not_a_note_is_refused_in_one_line(
    client: TestClient, layout: Layout, sent: Any, status: int, expected: str
) -> None:
    answer = client.post(PATH, json=sent, headers=OWN)
    assert (answer.status_code, expected in answer.json()["what"]) == (status, True), answer.text
    assert "\n" not in answer.json()["what"]
    assert texts(layout) == []


def test_other_captures_ids_and_texts_are_refused(client: TestClient, layout: Layout) -> None:
    for path, status in (
        ("/api/exp/sets/odd/77/notes", 404),
        ("/api/nix/sets/odd/1/notes", 404),
        ("/api/exp/sets/..~..~x/1/notes", 404),
    ):
        assert client.post(path, json={"start": 0, "stop": 1, "text": "x"}, headers=OWN).status_code == status
    assert client.put(f"{PATH}/..%2f..%2fconfig", json={"revision": 1}, headers=OWN).status_code == 404
    assert client.put(f"{PATH}/zzzzzzzzzzzz", json={"revision": 1}, headers=OWN).status_code == 404
    broken = client.post(PATH, content="{", headers={**OWN, "Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["what"].startswith("not valid JSON")) == (422, True)
    assert not (layout.folder / "notes").exists()


def test_a_read_only_page_and_a_folder_that_cannot_be_written_take_no_notes(
    page_root: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = TestClient(page_app(page_root, read_only=True), base_url=HOST)
    assert closed.get(PATH).json()["closed"] == "this page was started with --read-only: it takes no notes"
    answer = closed.post(PATH, json={"start": 2, "stop": 4, "text": "here"}, headers=OWN)
    assert (answer.status_code, "--read-only" in answer.json()["what"]) == (403, True)
    opened = TestClient(page_app(page_root), base_url=HOST)
    assert opened.get(PATH).json()["closed"] is None
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and access(path, mode))
    answer = opened.post(PATH, json={"start": 2, "stop": 4, "text": "here"}, headers=OWN)
    assert (answer.status_code, "experiments/exp cannot be written to" in answer.json()["what"]) == (403, True)
    assert texts(layout) == []


def test_an_exported_page_carries_notes_and_takes_none(page_root: Path, layout: Layout) -> None:
    add_note(layout, "odd", "1", on(1, 2), HOSTILE)
    export_page(page_root, "exp", ["odd"], page_root / "page.html")
    page = (page_root / "page.html").read_text(encoding="utf-8")
    found: Any = carried(page)["exp/sets/odd/1/notes"]
    assert [note["text"] for note in found["notes"]] == [HOSTILE]
    assert found["closed"] == "an exported page takes no notes"
    assert HOSTILE not in page


# -- Python, commands and exports -----------------------------------------------------------------

Run = Callable[..., Result]


def test_python_reads_and_makes_notes_and_overwriting_keeps_them(capture: Run, root: Path) -> None:  # noqa: F811
    assert capture("--no-project").exit_code == 0
    cap = Experiment("exp", root).captures["short"]["1"]
    assert cap.notes == []
    made = cap.add_note("starts here", cap.n_tokens - 2, cap.n_tokens)
    assert cap.notes == [made]
    assert made.tokens == cap.tokens[-2:]
    assert cap.add_note("one token", 0).stop == 1
    with pytest.raises(InputError, match="expected some of the tokens"):
        cap.add_note("too far", 10_000)
    assert capture("--no-project", "--overwrite", "--seed", "5", "--temperature", "2").exit_code == 0
    again = Experiment("exp", root).captures["short"]["1"]
    assert [note.text for note in again.notes] == ["one token", "starts here"]
    assert [note.fits(again.tokens) for note in again.notes] == [True, again.tokens[-2:] == made.tokens]
    for path in (root / "experiments" / "exp").rglob("1.*"):
        path.unlink()
    with pytest.raises(InputError, match="exp/short has no capture 1 any more"):
        again.add_note("of nothing", 0)
    shutil.rmtree(root / "experiments" / "exp")
    with pytest.raises(InputError, match="no experiment 'exp'"):
        again.add_note("nowhere", 0)
    assert not (root / "experiments" / "exp").exists()


@pytest.mark.parametrize("form", ["datasets", "safetensors", "json"])
def test_notes_travel_with_an_export(capture: Run, root: Path, tmp_path: Path, form: str) -> None:  # noqa: F811
    assert capture("--no-project", "--limit", "1").exit_code == 0
    cap = Experiment("exp", root).captures["short"]["1"]
    made = cap.add_note(HOSTILE, 1, 3)
    to = tmp_path / "exported"
    for words in (
        ["export", "--experiment", "exp", "--to", to, "--format", form, "--activations", "all", "--points", "all"],
        ["import", to, "--experiment", "back"],
    ):
        done = CliRunner().invoke(main, [str(each) for each in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert read_notes(Layout(root, "back"), "short", "1").notes == [made]


def test_a_note_that_leads_out_of_the_experiment_is_not_followed(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (layout.folder / "notes").mkdir()
    (layout.folder / "notes" / "odd").symlink_to(tmp_path / "elsewhere")
    if layout.root.resolve() in (tmp_path / "elsewhere").resolve().parents:
        (layout.folder / "notes" / "odd").unlink()
        (layout.folder / "notes" / "odd").symlink_to("/tmp")
    with pytest.raises(StorageError, match="leads out of the experiment"):
        add_note(layout, "odd", "1", on(1, 2), "x")
