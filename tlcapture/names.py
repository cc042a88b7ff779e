"""Names from outside that become parts of paths: experiments, prompt sets, prompt ids, traits.

A safe name can only mean a file directly inside the folder it is joined to: letters, digits, `.`, `_` and
`-`, not starting with `.` or `-`, at most 128 characters.

A prompt set may lie in subfolders: its name is a path of safe names, `general/mine`. A prompt's id is a safe name, or
a number, whose digits are one. The captures of a variant of a prompt set are a set of their own, `general/mine@lora`.
A capture has the name of its prompt, with that of its sample: `7`, `7.s1`.

    >>> check_name("my_exp", "experiment")
    'my_exp'
    >>> check_prompt_set("general/mine")
    'general/mine'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tlcapture.errors import InputError

MOST_FOLDERS = 8  # parts of the name of a prompt set
_LONGEST = 128
_LARGEST = 2**53 - 1
COMPACT = ".safetensors"  # the ending of analysis files in the compact form
_SAFE = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_LONGEST - 1}}}")

_SAMPLE = re.compile(r"(.+)\.s([1-9][0-9]{0,8})")

PromptId = int | str  # an id has the same type in every file as in its prompt set


def is_safe_name(name: str) -> bool:
    """Whether `name` is safe as a single path component."""
    return _SAFE.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """Return `name`, or raise `InputError` for an unsafe one; `what` is the kind of name, for the message."""
    if not isinstance(name, str) or not is_safe_name(name):
        folder, _, last = str(name).rstrip("/").rpartition("/")
        meant = f": did you mean {last!r}?" if folder and is_safe_name(last) else ""
        raise InputError(
            f"{what} {name!r} is not a safe file name: use letters, digits, '.', '_' and '-' "
            f"(at most 128, not starting with '.' or '-'){meant}"
        )
    return name


def is_prompt_set(name: str) -> bool:
    """Whether `name` is the name of a prompt set: safe names joined by `/`, together no longer than one may be."""
    parts = name.split("/")
    return len(name) <= _LONGEST and len(parts) <= MOST_FOLDERS and all(map(is_safe_name, parts))


def check_prompt_set(name: str) -> str:
    """Return the name of a prompt set, or raise `InputError`."""
    if not isinstance(name, str) or not is_prompt_set(name):
        raise InputError(
            f"prompt set {name!r} is not a safe file name: use letters, digits, '.', '_' and '-', and '/' after the "
            f"name of a folder (at most {_LONGEST}, in at most {MOST_FOLDERS} parts, not starting with '.' or '-')"
        )
    return name


def is_capture_set(name: str) -> bool:
    """Whether `name` is that of a prompt set, or of a variant of one: `SET` or `SET@VARIANT`."""
    prompt_set, at, variant = name.partition("@")
    return is_prompt_set(prompt_set) and (not at or is_safe_name(variant))


def check_capture_set(name: str) -> str:
    """Return the name of a prompt set or of a variant of one, or raise `InputError`."""
    if not isinstance(name, str):
        return check_prompt_set(name)
    prompt_set, at, variant = name.partition("@")
    check_prompt_set(prompt_set)
    if at:
        check_name(variant, "variant")
    return name


def base_set(name: str) -> str:
    """The prompt set of `SET` or `SET@VARIANT`."""
    return name.partition("@")[0]


def variant_of(name: str) -> str | None:
    """The variant of `SET@VARIANT`; `None` for a prompt set itself."""
    return name.partition("@")[2] or None


def of_variant(prompt_set: str, variant: str | None) -> str:
    """The name of the captures of a prompt set under a variant: `SET`, or `SET@VARIANT`."""
    return prompt_set if variant is None else f"{prompt_set}@{variant}"


def is_compared_name(name: str) -> bool:
    """Whether `name` is what compared captures are called in paths: `EXPERIMENT[+SET][@VARIANT]`, `+` for `/`."""
    rest, at, variant = name.partition("@")
    experiment, plus, prompt_set = rest.partition("+")
    is_set = not plus or is_prompt_set(prompt_set.replace("+", "/"))
    return is_safe_name(experiment) and is_set and (not at or is_safe_name(variant))


def prompt_id_problem(value: object) -> str | None:
    """Why a value cannot be the id of a prompt; `None` for a safe name or a whole number that JSON holds exactly."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return f"id {value!r}: expected a text or a whole number of at most {_LARGEST}"
    if isinstance(value, int) and value > _LARGEST:
        return f"id {value}: JSON readers lose digits of numbers above {_LARGEST}: write it as a text"
    if not is_safe_name(str(value)):
        return f"id {value!r} is not a safe file name (letters, digits, '.', '_', '-')"
    return None


def capture_name(prompt_id: PromptId, sample: int | None) -> PromptId:
    """The name of a capture in file names: its prompt's id, or `7.s2` for sample 2 of prompt 7."""
    return prompt_id if sample is None else f"{prompt_id}.s{sample}"


def split_name(name: str) -> tuple[str, int | None]:
    """The prompt's id and the sample's number that the name of a capture seems to state; `None` without a sample.

    A prompt's id may itself look like the name of a sample; the metadata of a capture tells them apart.
    """
    found = _SAMPLE.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def file_name(prompt_id: PromptId) -> str:
    """The name of a prompt in file names; raises `InputError` for an id that is not safe."""
    return check_name(str(prompt_id), "prompt id")


@dataclass(frozen=True, order=True)
class Trait:
    """A trait, `category/name`, for example `behavioral/refusal`."""

    category: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Trait:
        """Read `category/name`; raises `InputError` for anything else."""
        parts = text.strip().split("/")
        if len(parts) != 2 or not all(is_safe_name(part) for part in parts):
            raise InputError(f"trait {text!r} is not of the form category/name, for example behavioral/refusal")
        if parts[0] == "raw":
            raise InputError(f"trait {text!r}: the category 'raw' is reserved for the folder of captures")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.category}/{self.name}"


def split_names(text: str | None) -> list[str]:
    """Split a comma-separated option into its parts, without empty ones."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
