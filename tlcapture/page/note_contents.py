"""The page's notes on captures: read, made, changed and removed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, ValidationError

from tlcapture.captures.notes import (
    Marked,
    Note,
    NoteText,
    add_note,
    change_note,
    note_of,
    read_notes,
    remove_note,
)
from tlcapture.errors import InputError
from tlcapture.page.view_contents import ViewContents
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.validation import Count, FileContent, first_problem

READ_ONLY = "this page was started with --read-only: it takes no notes"
EXPORTED = "an exported page takes no notes"


class NewNote(FileContent):
    """The page's request to make a note."""

    start: Count
    stop: Count
    text: NoteText


class ChangedNote(FileContent):
    """The page's request to change a note, or without `text` to remove it."""

    revision: int = Field(ge=1)
    text: NoteText | None = None


class ClosedError(InputError):
    """Notes cannot be made or changed."""


@dataclass(frozen=True)
class NoteContents(ViewContents, ABC):
    """The notes on captures; where notes are closed, changing one fails with the reason.

    Attributes:
        notes_closed: why notes cannot be made or changed; empty if they can.
    """

    notes_closed: str = field(default="", kw_only=True)

    def notes(self, experiment: str, prompt_set: str, prompt_id: str) -> dict[str, Any]:
        """The notes on a capture, whether each still fits its tokens, and why no others can be made, if so."""
        layout = self._layout(experiment)
        found = read_notes(layout, prompt_set, prompt_id)
        tokens = self.tokens(experiment, prompt_set, prompt_id) if found.notes else []
        notes = [{**note.model_dump(), "is_current": note.fits(tokens)} for note in found.notes]
        closed = self._closed(layout) or None
        return {"notes": notes, "closed": closed, "problems": [self.problem(error) for error in found.problems]}

    @abstractmethod
    def tokens(self, experiment: str, prompt_set: str, prompt_id: str) -> Sequence[str]:
        """The tokens of a capture."""

    def add_note(self, experiment: str, prompt_set: str, prompt_id: str, sent: Any) -> dict[str, Any]:
        """Make a note; raises `InputError` for an invalid note, and where notes are closed."""
        layout, new = self._open(experiment), _valid(NewNote, sent)
        if not layout.has_prompt(prompt_set, prompt_id):
            raise InputError(f"{experiment}/{prompt_set} has no capture {prompt_id}")
        marked = Marked.of(self.tokens(experiment, prompt_set, prompt_id), new.start, new.stop)
        return add_note(layout, prompt_set, prompt_id, marked, new.text).model_dump()

    def change_note(self, experiment: str, prompt_set: str, prompt_id: str, note: str, sent: Any) -> dict[str, Any]:
        """Change a note's text, or remove it; raises `NoteChangedError` if somebody else has changed it."""
        layout, change = self._open(experiment), _valid(ChangedNote, sent)
        before: Note = note_of(layout, prompt_set, prompt_id, note, change.revision)
        if change.text is None:
            remove_note(layout, before)
            return {}
        return change_note(layout, before, change.text).model_dump()

    def _open(self, experiment: str) -> Layout:
        layout = self._layout(experiment)
        closed = self._closed(layout)
        if closed:
            raise ClosedError(closed)
        return layout

    def _closed(self, layout: Layout) -> str:
        if self.notes_closed or os.access(layout.folder, os.W_OK):
            return self.notes_closed
        return f"experiments/{layout.experiment} cannot be written to: no notes are taken"


def _valid(kind: type[Any], sent: Any) -> Any:
    try:
        return kind.model_validate(sent)
    except ValidationError as error:
        raise InputError(f"not a valid note: {first_problem(error)}") from None
