"""Options that reach a command as one dataclass.

@dataclass(frozen=True)
class EngineOptions:
    engine: str
    device: str

engine_options = together(click.option("--engine"), click.option("--device"), collected(EngineOptions, "engine"))

@click.command()
@engine_options
def doctor(engine: EngineOptions): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*decorators: Decorator) -> Decorator:
    """Several option decorators as one, in the order of the help text."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def collected(group: type[Any], argument: str) -> Decorator:
    """Pass the options that are named like the fields of a dataclass as one `argument` of that class.

    A field may also be the argument of another group, whose decorator stands above this one.
    """
    names = [field.name for field in fields(group)]

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collect(*args: Any, **options: Any) -> Any:
            chosen = group(**{name: options.pop(name) for name in names})
            return command(*args, **options, **{argument: chosen})

        return collect

    return apply
