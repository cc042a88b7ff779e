"""Validation of file contents with pydantic models: valid content, or an error message of one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.text import counted, first_line, printable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_LONGEST = 60  # characters of a text of a file in a message
_BITS = 64  # of a number in a message
_BRANCHES = {"int", "str", "float", "bool"}  # at the end of the place of a problem: a type that a field may have
_TEXT, _WHOLE, _NUMBER, _LIST, _OBJECT = "a text", "a whole number", "a number", "a list", "an object"
_EXPECTED = {
    "string_type": _TEXT,
    "string_unicode": "a text of Unicode characters",
    "string_too_short": "a text of at least {min_length} characters",
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": "a whole number of at most 64 bits",
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": _LIST,
    "tuple_type": _LIST,
    "dict_type": _OBJECT,
    "mapping_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "greater_than_equal": "a number of at least {ge:.10g}",
    "greater_than": "a number above {gt:.10g}",
    "less_than_equal": "a number of at most {le:.10g}",
    "less_than": "a number below {lt:.10g}",
    "literal_error": "{expected}",
    "is_instance_of": "a {class}",
    "none_required": "null",
}

Layer = Annotated[int, Field(ge=0, lt=10_000)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # a probability, an attention weight, an accuracy
# All measured numbers come from float32; the square of a larger one can overflow.
Number = Annotated[float, Field(ge=-3.5e38, le=3.5e38)]
Percent = Annotated[float, Field(ge=0, le=100)]


class FileContent(BaseModel):
    """Base class for the content of JSON files: types are not coerced, numbers are finite, extra fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


Content = TypeVar("Content", bound=BaseModel)


def checked(model: type[Content], value: Any, path: Path, what: str) -> Content:
    """The validated content of a file of kind `what` (such as `projection`).

    Raises:
        StorageError: the content is not valid for that kind of file; the message has file, field and reason.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise not_valid(path, what, first_problem(error)) from None


def not_valid(path: Path, what: str, problem: str) -> StorageError:
    """The error for a file that is not valid for its kind `what` (such as `projection`)."""
    return StorageError(f"{path}: not a valid {what} file: {problem}")


@contextmanager
def of_form(place: object, what: str) -> Iterator[None]:
    """Refuse content that does not have the form that the code within expects; `what` is its kind.

    Raises `StorageError`, which names the place, for any error that such content causes.
    """
    try:
        yield
    except TlcaptureError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # not about the content
            raise
        raise StorageError(f"{place}: not a valid {what}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """What an error says about content of another form than expected, in one line and in plain words."""
    if isinstance(error, ValidationError):
        return first_problem(error)
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}" if error.args else "it lacks a part"
    if isinstance(error, TypeError | AttributeError | IndexError):  # their messages are about the code
        return "a value in it has another form than expected"
    return first_line(error)


def first_problem(error: ValidationError) -> str:
    """The first problem as `field: expected ..., found ...`, with the number of further ones; always a single line.

    A problem of the content as a whole has no field in front of it.
    """
    problems = error.errors(include_url=False)
    first, *others = problems
    branch = first["loc"][-1:]
    if branch and branch[0] in _BRANCHES:  # one problem for each of the types that a field may have
        first = {**first, "loc": first["loc"][:-1]}
        branches = [each for each in others if each["loc"][:-1] == first["loc"] and each["loc"][-1] in _BRANCHES]
        others = [each for each in others if each not in branches]
        expected = dict.fromkeys(_expected(each) for each in (first, *branches))
        message = f"expected {' or '.join(expected)}, found {in_few_words(first['input'])}"
    else:
        message = _message(first)
    where = _field(first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    return printable(f"{where}: {message}{more}" if where else f"{message}{more}")


def _field(parts: Sequence[int | str]) -> str:
    """A place in a file, such as `prompts[0].id`."""
    shown = (f"[{part}]" if isinstance(part, int) else f".{part[:_LONGEST]}" for part in parts if part != "[key]")
    return "".join(shown).lstrip(".")


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == "value_error":  # of a check of this package
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return "expected, but missing"
    name = " as its name" if problem["loc"][-1:] == ("[key]",) else ""
    return f"expected {_expected(problem)}{name}, found {in_few_words(problem['input'])}"


def _expected(problem: ErrorDetails) -> str:
    """What a problem of pydantic expects, in the words of JSON; in pydantic's own where they are not known here."""
    limits = problem.get("ctx", {})
    kind = problem["type"]
    if kind in ("too_short", "too_long"):
        least = limits["min_length"] if kind == "too_short" else limits["max_length"]
        return f"at {'least' if kind == 'too_short' else 'most'} {counted(least, 'entry', 'entries')}"
    template = _EXPECTED.get(kind)
    return str(problem["msg"]) if template is None else template.format(**limits)


def in_few_words(value: object) -> str:
    """A value in few words: a short one itself, otherwise its kind."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST else f"{value[:_LONGEST]!r}..."
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"a number of more than {_BITS} bits"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"a list of {counted(len(value), 'entry', 'entries')}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
