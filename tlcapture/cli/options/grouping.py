"""Options as the fields of a dataclass, which reaches a command as one argument.

@dataclass(frozen=True)
class EngineOptions:
    engine: str = option("--engine", default="auto", help="...")
    device: str = option("--device", default="auto", help="...")

@click.command()
@options_of(EngineOptions, "engine")
def doctor(engine: EngineOptions): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from functools import wraps
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_SOURCE = "source"  # the key of a field's metadata: the decorator, or the dataclass, that its value comes from


def option(*names: str, **attributes: Any) -> Any:
    """A field with the value of an option; the arguments are those of `click.option`."""
    return shared(click.option(*names, **attributes))


def shared(source: Decorator | type[Any]) -> Any:
    """A field with the value of an option, given as its decorator, or of another dataclass of options."""
    return field(metadata={_SOURCE: source})


def options_of(group: type[Any], argument: str, **replaced: Decorator) -> Decorator:
    """Give a command the options of a dataclass, in the order of its fields, and pass them as one `argument`.

    `replaced` are options that take the place of those of the fields with their names.
    """
    sources = {each.name: each.metadata[_SOURCE] for each in fields(group)} | replaced

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collect(*args: Any, **options: Any) -> Any:
            chosen = group(**{name: options.pop(name) for name in sources})
            return command(*args, **options, **{argument: chosen})

        decorated: Callable[..., Any] = collect
        for name, source in reversed(sources.items()):
            decorator = options_of(source, name) if isinstance(source, type) else source
            decorated = decorator(decorated)
        return decorated

    return apply
