"""Validation of file contents with pydantic models: valid content, or an error message of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlcapture.errors import StorageError
from tlcapture.text import printable

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


def first_problem(error: ValidationError) -> str:
    """The first problem as `field: message`, with the number of further ones; always a single line."""
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return printable(f"{where or 'the whole file'}: {message}{more}")
