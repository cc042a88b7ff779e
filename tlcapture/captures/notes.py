"""Notes that people make on tokens of a capture: one small file each, kept when the prompt is captured again.

    notes/{prompt_set}/{name}_{id}.json

    note = add_note(layout, "single_trait", "7", Marked(52, 55, (" I", " can", "not")), "refuses here")
    read_notes(layout, "single_trait", "7").notes[0].text

Since a note is a file, two people who make notes at the same time lose none. A note is changed and removed by its
revision, so that nobody overwrites what they have not seen. Loads no torch.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from tlcapture.captures.provenance import now
from tlcapture.errors import InputError, StorageError
from tlcapture.names import PromptId, check_capture_set, file_name
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import read_json, remove, write_json
from tlcapture.storage.folders import stems_in
from tlcapture.storage.locks import locked
from tlcapture.storage.remote.roots import refresh
from tlcapture.storage.validation import Count, FileContent, checked
from tlcapture.text import is_unicode

LONGEST = 10_000  # characters of a note
_ID = re.compile(r"[0-9a-f]{12}")
NoteText = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST)]


class NoteChangedError(InputError):
    """Somebody else has changed or removed the note since it was read."""


class Note(FileContent):
    """A note on the tokens `start` to `stop` of a capture, over prompt and response together; `stop` is after the last.

    Attributes:
        name: of the capture in its set: the id of its prompt, or `7.s1` for a sample.
        tokens: the texts of these tokens when the note was made.
        revision: 1, and one more with every change.
        created, updated: times in UTC.
    """

    format_version: Literal[1] = 1
    id: Annotated[str, Field(pattern=_ID.pattern)]
    prompt_set: str
    name: str
    start: Count
    stop: Count
    tokens: list[str]
    text: NoteText
    revision: Annotated[int, Field(ge=1)]
    created: str
    updated: str

    @model_validator(mode="after")
    def _is_on_its_tokens(self) -> Note:
        if self.stop - self.start != len(self.tokens) or not self.tokens:
            raise ValueError(f"{len(self.tokens)} tokens from {self.start} to {self.stop}")
        return self

    def fits(self, tokens: Sequence[str]) -> bool:
        """Whether a capture still has the tokens that the note was made on; false once other tokens were generated."""
        return list(tokens[self.start : self.stop]) == self.tokens


@dataclass(frozen=True)
class Marked:
    """Tokens to make a note on: their place and their texts."""

    start: int
    stop: int
    tokens: Sequence[str]

    @classmethod
    def of(cls, tokens: Sequence[str], start: int, stop: int | None = None) -> Marked:
        """Tokens of a capture, one token unless `stop` is given; raises `InputError` for others."""
        end = start + 1 if stop is None else stop
        if not 0 <= start < end <= len(tokens):
            raise InputError(
                f"tokens {start} to {end}: expected some of the tokens 0 to {len(tokens) - 1} of the capture"
            )
        return cls(start, end, tokens[start:end])


@dataclass(frozen=True)
class Notes:
    """The notes of a capture in the order of its tokens, and files that cannot be read."""

    notes: list[Note] = field(default_factory=list)
    problems: list[StorageError] = field(default_factory=list)


def read_notes(layout: Layout, prompt_set: str, name: PromptId) -> Notes:
    """The notes on a capture."""
    found = Notes()
    for note_id in _ids(layout, prompt_set).get(file_name(name), ()):
        try:
            found.notes.append(_read(_path(layout, prompt_set, name, note_id)))
        except FileNotFoundError:  # removed meanwhile
            continue
        except StorageError as error:
            found.problems.append(error)
    found.notes.sort(key=lambda note: (note.start, note.stop, note.created, note.id))
    return found


def note_counts(layout: Layout, prompt_set: str) -> dict[str, int]:
    """How many notes each capture of a set has; captures without one are left out."""
    return {name: len(ids) for name, ids in _ids(layout, prompt_set).items()}


def add_note(layout: Layout, prompt_set: str, name: PromptId, marked: Marked, text: str) -> Note:
    """Write a new note; raises `InputError` for an empty or too long text, `StorageError` if it cannot be written."""
    time = now()
    place = {"prompt_set": prompt_set, "name": file_name(name)}
    on = {"start": marked.start, "stop": marked.stop, "tokens": list(marked.tokens)}
    times = {"revision": 1, "created": time, "updated": time}
    note = Note(id=secrets.token_hex(6), **place, **on, text=_checked_text(text), **times)  # type: ignore[arg-type]
    return put_note(layout, note)


def put_note(layout: Layout, note: Note) -> Note:
    """Write a note as it is; raises `StorageError` if it cannot be written."""
    write_json(_path(layout, note.prompt_set, note.name, note.id), note.model_dump(), indent=True)
    return note


def change_note(layout: Layout, note: Note, text: str) -> Note:
    """Replace the text of a note that was read, unless somebody has changed it since.

    Raises:
        InputError: the text is empty or too long.
        NoteChangedError: it was changed or removed in the meantime.
        StorageError: it cannot be read or written.
    """
    with locked(layout.lock("notes")):
        before = _unchanged(layout, note)
        changes = {"text": _checked_text(text), "revision": before.revision + 1, "updated": now()}
        return put_note(layout, before.model_copy(update=changes))


def remove_note(layout: Layout, note: Note) -> None:
    """Remove a note that was read; raises as `change_note`."""
    with locked(layout.lock("notes")):
        _unchanged(layout, note)
        remove([_path(layout, note.prompt_set, note.name, note.id)])


def note_of(layout: Layout, prompt_set: str, name: PromptId, note_id: str, revision: int) -> Note:
    """The note with this id and revision; raises as `change_note`."""
    if not _ID.fullmatch(note_id):
        raise InputError(f"note {note_id[:20]!r}: expected twelve digits of its id")
    refresh(notes_folder(layout, prompt_set))
    try:
        note = _read(_path(layout, prompt_set, name, note_id))
    except FileNotFoundError:
        raise NoteChangedError("somebody has removed this note meanwhile") from None
    if note.revision != revision:
        raise NoteChangedError("somebody has changed this note meanwhile: look at it before you change it")
    return note


def _unchanged(layout: Layout, note: Note) -> Note:
    return note_of(layout, note.prompt_set, note.name, note.id, note.revision)


def _checked_text(text: str) -> str:
    found = text.strip()
    if not 1 <= len(found) <= LONGEST:
        raise InputError(f"a note of {len(found)} characters: expected 1 to {LONGEST:,}")
    if not is_unicode(found):
        raise InputError("a note that is not valid Unicode: expected text")
    return found


def _ids(layout: Layout, prompt_set: str) -> dict[str, list[str]]:
    """The ids of the notes of each capture of a set, by its name."""
    found: dict[str, list[str]] = {}
    for stem in sorted(stems_in(notes_folder(layout, prompt_set), ".json")):
        name, _, note_id = stem.rpartition("_")
        if _ID.fullmatch(note_id) and not name.startswith("."):
            found.setdefault(name, []).append(note_id)
    return found


def notes_folder(layout: Layout, prompt_set: str) -> Path:
    """The folder of the notes on a set's captures."""
    return layout.own(layout.folder / "notes" / check_capture_set(prompt_set))


def _path(layout: Layout, prompt_set: str, name: PromptId, note_id: str) -> Path:
    return layout.own(notes_folder(layout, prompt_set) / f"{file_name(name)}_{note_id}.json")


def _read(path: Path) -> Note:
    """The note of a file; raises `FileNotFoundError` where there is none, `StorageError` if it is damaged."""
    if not path.exists():
        raise FileNotFoundError(path)
    content: Any = read_json(path)
    return checked(Note, content, path, "note")
