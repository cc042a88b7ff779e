"""Prompt sets: their format, reading and validation. Importing this module loads no torch.

{"name": "a title, optional", "description": "...", "system_prompt": "optional",
 "prompts": [{"id": 1, "text": "...", "note": "optional", "system_prompt": "optional", "any other key": "kept"},
             {"id": 2, "messages": [{"role": "user", "content": "..."}, ...]}]}

A prompt is a text or a conversation. A bare list of prompts is a prompt set too, and `prompt` another name for either.
A known key with the value null counts as missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tlcapture.errors import InputError, StorageError
from tlcapture.names import PromptId, check_prompt_set, prompt_id_problem
from tlcapture.prompts.conversations import check_messages, system_prompt_of, text_of
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.files import read_json
from tlcapture.storage.validation import first_problem, in_few_words
from tlcapture.text import is_unicode

ADHOC = "adhoc"  # the prompt set of prompts that are given as text


class Prompt(BaseModel):
    """One prompt of a set.

        Prompt(id=1, text="How do tides work?", difficulty="easy")

    Attributes:
        id: a safe file name (letters, digits, `.`, `_`, `-`) or a whole number; it keeps its type in all files.
        text: the prompt, not empty; for a conversation the text of its last user message.
        messages: the messages of a conversation (see `prompts/conversations`); empty for a text.
        note: a comment, not given to the model.
        system_prompt: overrides the system prompt of the set and of the experiment.
        fields: all other keys, which metadata hold as `prompt_fields`.

    Raises `pydantic.ValidationError` for an invalid value.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    id: PromptId
    text: str
    messages: tuple[dict[str, Any], ...] = ()
    note: str | None = None
    system_prompt: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The unknown keys of the prompt, with their values.

        Example:
            Prompt(id=1, text="How do tides work?", difficulty="easy").fields
        """
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _text_may_be_called_prompt(cls, value: object) -> object:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise ValueError(f'expected {{"id", "text"}} or {{"id", "messages"}}, found {in_few_words(value)}')
        value = _without_nulls(value, {*cls.model_fields, "prompt"} - {"id"})
        if isinstance(value.get("prompt"), list):
            value = {("messages" if key == "prompt" else key): each for key, each in value.items()}
        if "messages" in value:
            return _with_text_of_messages(value)
        if "prompt" not in value:
            return value
        if "text" in value:
            raise ValueError("both text and prompt: leave out one of them")
        return {("text" if key == "prompt" else key): each for key, each in value.items()}

    @field_validator("id", mode="before")
    @classmethod
    def _id_is_valid(cls, value: object) -> object:
        if problem := prompt_id_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("text")
    @classmethod
    def _text_is_not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("text is empty")
        return _unicode(value, "text")

    @field_validator("messages")
    @classmethod
    def _messages_are_unicode(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for number, message in enumerate(value, start=1):
            _unicode(message["content"], f"message {number}: content")
        return value

    @model_validator(mode="after")
    def _fields_are_plain(self) -> Prompt:
        for name, value in self.fields.items():
            try:
                self.model_extra[name] = _plain(value, name)  # type: ignore[index]
            except RecursionError:
                raise ValueError(f"{name}: nested too deeply") from None
        return self


def _plain(value: Any, name: str) -> Any:
    """A value as metadata can hold it, numbers and arrays of NumPy as Python's own; raises `ValueError` for others."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, int | float | str):  # of a class of its own
        return str.__str__(value) if isinstance(value, str) else int(value) if isinstance(value, int) else float(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(each, name) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, name) for each in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), name)
    raise ValueError(f"{name}: expected a JSON value, which metadata can hold, found {in_few_words(value)}")


def _without_nulls(value: dict[Any, Any], known: set[str]) -> dict[Any, Any]:
    return {key: each for key, each in value.items() if each is not None or key not in known}


def _unicode(text: str, what: str) -> str:
    if not is_unicode(text):
        raise ValueError(f"{what} contains half of a surrogate pair, which is not a Unicode character")
    return text


def _with_text_of_messages(value: dict[Any, Any]) -> dict[Any, Any]:
    """A conversation with its checked messages, and the text that stands for it."""
    if "prompt" in value or "text" in value:
        raise ValueError("both messages and text: leave out one of them")
    if not isinstance(value["messages"], list | tuple):
        raise ValueError("messages: expected a list")
    messages = check_messages(value["messages"])
    if value.get("system_prompt") is not None and system_prompt_of(messages) is not None:
        raise ValueError("both system_prompt and a system message: leave out one of them")
    return {**value, "messages": messages, "text": text_of(messages)}


class PromptSet(BaseModel):
    """A named list of prompts; further keys are kept.

        PromptSet(name="mine", prompts=[Prompt(id=1, text="How do tides work?")])

    Attributes:
        name: the file's path below `datasets/inference/` without `.json`, for example `mine` or `general/mine`.
        title: the set's title in the file, or its name if the file has none.
        description: what the set is for.
        system_prompt: used for every prompt that has none of its own.
        prompts: at least one; ids are unique as file names, ignoring case.

    Raises `pydantic.ValidationError` for an invalid value.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    title: str = ""
    description: str = ""
    system_prompt: str | None = None
    prompts: list[Prompt] = Field(min_length=1)

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, value: str) -> str:
        try:
            return check_prompt_set(value)
        except InputError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _ids_are_unique(self) -> PromptSet:
        seen: dict[str, PromptId] = {}
        for prompt in self.prompts:
            # On some file systems, names that differ only in case are the same file.
            name = str(prompt.id).lower()
            if name in seen and seen[name] != prompt.id:
                raise ValueError(f"ids {seen[name]!r} and {prompt.id!r} would have the same files")
            if name in seen:
                raise ValueError(f"id {prompt.id!r} occurs twice in prompts")
            seen[name] = prompt.id
        return self

    def system_prompt_of(self, prompt: Prompt, default: str | None = None) -> str | None:
        """The prompt's own system prompt or message, else the set's, else `default` (the experiment's).

        Example:
            mine = PromptSet(name="mine", prompts=[Prompt(id=1, text="Hello?")], system_prompt="Be brief.")
            mine.system_prompt_of(mine.prompts[0])
        """
        for candidate in (prompt.system_prompt, system_prompt_of(prompt.messages), self.system_prompt):
            if candidate is not None:
                return candidate
        return default


def read_prompt_set(datasets: Datasets, name: str) -> PromptSet:
    """Read a prompt set by name; raises `InputError`, with file and field, if it is missing or invalid."""
    try:
        path = datasets.prompt_set_file(name)
    except InputError as error:
        raise InputError(f"{error}{_in_another_form(datasets, name)}") from None
    except StorageError as error:
        raise InputError(str(error)) from None
    return read_prompt_file(path, name)


def _in_another_form(datasets: Datasets, name: str) -> str:
    """The end of an error about a missing prompt set, where there is a file such as `mine.jsonl` or `mine.csv`."""
    stem = Path(str(name).rpartition("inference/")[2]).stem
    folder = datasets.folders[0] / "inference"
    found = [path for path in sorted(folder.glob("*.*")) if path.stem == stem and path.suffix != ".json"]
    return f'; {found[0]} is not one: a prompt set is a .json file, {{"prompts": [{{"id", "text"}}]}}' if found else ""


def read_prompt_file(path: Path, name: str | None = None) -> PromptSet:
    """Read and validate one prompt set file; raises `InputError`, with file and field, if it is invalid.

    `name` is the name of the set, by default the file's own; the `name` in the file is a title.
    """
    name = path.stem if name is None else name
    try:
        value = read_json(path, exact=True)
        content = {"prompts": value} if isinstance(value, list) else value
        if not isinstance(content, dict) or "prompts" not in content:
            raise InputError(f'{path}: expected a list of prompts, or {{"prompts": [...]}}')
        content = _without_nulls(content, {*PromptSet.model_fields})
        if not isinstance(content.get("name", name), str):
            raise InputError(f"{path}: name: expected a text")
        content = {**content, "name": name, "title": content.get("title", content.get("name", name))}
        return PromptSet.model_validate(content)
    except StorageError as error:
        raise InputError(str(error)) from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from None


def read_all_prompt_sets(datasets: Datasets) -> tuple[list[PromptSet], list[tuple[str, str]]]:
    """All prompt sets, and the names of those that cannot be read, with the reasons."""
    found: list[PromptSet] = []
    refused: list[tuple[str, str]] = []
    for name, path in datasets.prompt_set_files().items():
        try:
            found.append(read_prompt_file(path, name))
        except InputError as error:
            refused.append((name, str(error)))
    return found, refused


def mistyped_keys(prompt_set: PromptSet) -> list[str]:
    """Unknown keys that resemble a known key, each as one line of text, once."""
    kinds: list[tuple[dict[str, Any], set[str]]] = [(prompt_set.model_extra or {}, set(PromptSet.model_fields))]
    kinds += [(prompt.model_extra or {}, {*Prompt.model_fields, "prompt"}) for prompt in prompt_set.prompts]
    found: dict[str, None] = {}
    for further, known in kinds:
        for key in further:
            meant = get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.8) if len(key) > 3 else []
            meant = ["system_prompt"] if key.lower() == "system" else meant
            if meant:
                found[f"{prompt_set.name}: {key!r} is kept as a key without a meaning here: is it {meant[0]!r}?"] = None
    return list(found)


def adhoc(given: Sequence[tuple[str, str | Sequence[Any]]]) -> PromptSet:
    """Texts, or lists of messages, as prompts 1, 2, ... of the prompt set `adhoc`.

    `given` has each with the option that it was given by, which the message of `InputError` names.
    """
    made = []
    for number, (option, content) in enumerate(given, start=1):
        kind = "text" if isinstance(content, str) else "messages"
        try:
            made.append(Prompt.model_validate({"id": str(number), kind: content}))
        except ValidationError as error:
            raise InputError(f"{option}: {first_problem(error)}") from None
    return PromptSet(name=ADHOC, description="given on the command line", prompts=made)
