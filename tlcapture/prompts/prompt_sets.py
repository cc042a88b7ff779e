"""Prompt sets: reading and checking them, before any model is loaded.

{"name": "single_trait", "description": "...", "system_prompt": "optional",
 "prompts": [{"id": "1", "text": "...", "note": "optional", "system_prompt": "optional"}]}
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tlcapture.errors import InputError, StorageError
from tlcapture.names import is_safe_name
from tlcapture.storage.files import read_json
from tlcapture.storage.layout import Datasets
from tlcapture.storage.validation import first_problem

ADHOC = "adhoc"


class Prompt(BaseModel):
    """One prompt of a set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    text: str
    note: str | None = None
    system_prompt: str | None = None

    @field_validator("id", mode="before")
    @classmethod
    def _id_is_a_safe_name(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and not is_safe_name(value):
            raise ValueError(f"id {value!r} is no safe file name (letters, digits, '.', '_', '-')")
        return value

    @field_validator("text")
    @classmethod
    def _text_is_not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("text is empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text holds half a surrogate pair, which is no Unicode character") from None
        return value


class PromptSet(BaseModel):
    """A named list of prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    system_prompt: str | None = None
    prompts: list[Prompt] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_are_unique(self) -> PromptSet:
        seen: set[str] = set()
        for prompt in self.prompts:
            # Files of ids that differ in case only are one file on some systems.
            if prompt.id.lower() in seen:
                raise ValueError(f"id {prompt.id!r} occurs twice in prompts")
            seen.add(prompt.id.lower())
        return self

    def system_prompt_of(self, prompt: Prompt, default: str | None = None) -> str | None:
        """The nearest system prompt: the prompt's own, the set's, or `default` (the experiment's)."""
        for candidate in (prompt.system_prompt, self.system_prompt):
            if candidate is not None:
                return candidate
        return default


def read_prompt_set(datasets: Datasets, name: str) -> PromptSet:
    """Read a prompt set by name. Raises `InputError` with file and field for whatever is wrong in it."""
    return read_prompt_file(datasets.prompt_set_file(name))


def read_prompt_file(path: Path) -> PromptSet:
    """Read and check one prompt set file, whose name must be the set's."""
    try:
        prompt_set = PromptSet.model_validate(read_json(path))
    except StorageError as error:
        raise InputError(str(error)) from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None
    if prompt_set.name != path.stem:
        raise InputError(f"{path}: name: expected {path.stem!r}, the file's name, but it says {prompt_set.name!r}")
    return prompt_set


def adhoc(text: str) -> PromptSet:
    """A single text as prompt 1 of the prompt set `adhoc`."""
    try:
        return PromptSet(name=ADHOC, description="given on the command line", prompts=[Prompt(id="1", text=text)])
    except ValidationError as error:
        raise InputError(f"--prompt: {first_problem(error)}") from None
