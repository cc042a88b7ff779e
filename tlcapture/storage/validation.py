"""What files hold, checked against pydantic models: the content as it should be, or one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlcapture.errors import StorageError
from tlcapture.text import printable

Layer = Annotated[int, Field(ge=0, lt=10_000)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # a probability, an attention weight, an accuracy
# Whatever is measured here was a float32 once; beyond, the square of a number is none.
Number = Annotated[float, Field(ge=-3.5e38, le=3.5e38)]
Percent = Annotated[float, Field(ge=0, le=100)]


class FileContent(BaseModel):
    """Base of what a JSON file holds: no type is guessed at, every number is finite, further fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


Content = TypeVar("Content", bound=BaseModel)


def checked(model: type[Content], value: Any, path: Path, what: str) -> Content:
    """The content of a file that should hold `what`; raises `StorageError` with file, field and reason."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise StorageError(f"{path}: no {what}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem as `field: what is wrong`, and how many more there are; one line whatever the file holds."""
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return printable(f"{where or 'the whole file'}: {message}{more}")
