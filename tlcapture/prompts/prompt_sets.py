"""Prompt sets: their format, reading and validation. Importing this module loads no torch.

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

ADHOC = "adhoc"  # the prompt set of prompts that are given as text


class Prompt(BaseModel):
    """One prompt of a set.

    Attributes:
        id: a safe file name (letters, digits, `.`, `_`, `-`); an integer is converted to a string.
        text: the prompt, not empty.
        note: a comment, not given to the model.
        system_prompt: overrides the system prompt of the set and of the experiment.

    Raises `pydantic.ValidationError` for an invalid value or an unknown field.
    """

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
            raise ValueError(f"id {value!r} is not a safe file name (letters, digits, '.', '_', '-')")
        return value

    @field_validator("text")
    @classmethod
    def _text_is_not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("text is empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text contains half of a surrogate pair, which is not a Unicode character") from None
        return value


class PromptSet(BaseModel):
    """A named list of prompts.

    Attributes:
        name: the file name without `.json`.
        description: what the set is for.
        system_prompt: used for every prompt that has none of its own.
        prompts: at least one; ids are unique, ignoring case.

    Raises `pydantic.ValidationError` for an invalid value or an unknown field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    system_prompt: str | None = None
    prompts: list[Prompt] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_are_unique(self) -> PromptSet:
        seen: set[str] = set()
        for prompt in self.prompts:
            # On some file systems, names that differ only in case are the same file.
            if prompt.id.lower() in seen:
                raise ValueError(f"id {prompt.id!r} occurs twice in prompts")
            seen.add(prompt.id.lower())
        return self

    def system_prompt_of(self, prompt: Prompt, default: str | None = None) -> str | None:
        """The prompt's own system prompt, else the set's, else `default` (the experiment's)."""
        for candidate in (prompt.system_prompt, self.system_prompt):
            if candidate is not None:
                return candidate
        return default


def read_prompt_set(datasets: Datasets, name: str) -> PromptSet:
    """Read a prompt set by name; raises `InputError`, with file and field, if it is missing or invalid."""
    return read_prompt_file(datasets.prompt_set_file(name))


def read_prompt_file(path: Path) -> PromptSet:
    """Read and validate one prompt set file; raises `InputError`, with file and field, if it is invalid.

    The file name must be the name of the set.
    """
    try:
        prompt_set = PromptSet.model_validate(read_json(path))
    except StorageError as error:
        raise InputError(str(error)) from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None
    if prompt_set.name != path.stem:
        raise InputError(f"{path}: name: expected {path.stem!r}, the file's name, got {prompt_set.name!r}")
    return prompt_set


def adhoc(text: str) -> PromptSet:
    """A single text as prompt 1 of the prompt set `adhoc`."""
    try:
        return PromptSet(name=ADHOC, description="given on the command line", prompts=[Prompt(id="1", text=text)])
    except ValidationError as error:
        raise InputError(f"--prompt: {first_problem(error)}") from None
