"""The dataclasses of the package: those whose fields hold arrays, by the source; those in reach of a user, by value."""

from __future__ import annotations

import ast
import dataclasses as std
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "tlcapture"
ARRAYS = {"Tensor", "NDArray", "ndarray", "ActivationCache"}


@dataclass(frozen=True)
class Found:
    """A dataclass: where it is, whether `==` compares its fields, and the annotations of these."""

    module: str
    name: str
    compares: bool
    is_frozen: bool
    fields: dict[str, ast.expr] = field(compare=False, repr=False)


@cache
def _body(module: str) -> ast.Module:
    path = PACKAGE.parent / (module.replace(".", "/"))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _names(module: str) -> dict[str, ast.AST | tuple[str, str]]:
    """What each name at the top of a module is: a class, the value of an alias, or where it is imported from."""
    names: dict[str, ast.AST | tuple[str, str]] = {}
    for node in ast.walk(_body(module)):
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.setdefault(node.targets[0].id, node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tlcapture"):
            names |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
    return names


def _dataclass(module: str, node: ast.ClassDef) -> Found | None:
    for each in node.decorator_list:
        name, options = (each.func, each.keywords) if isinstance(each, ast.Call) else (each, [])
        if isinstance(name, ast.Name) and name.id == "dataclass":
            given = {option.arg: ast.literal_eval(option.value) for option in options}
            own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            fields = {
                item.target.id: item.annotation
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            compares = given.get("eq", True) and "__eq__" not in own
            return Found(module, node.name, compares, given.get("frozen", False), fields)
    return None


def dataclasses() -> Iterator[Found]:
    """Every dataclass of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(_body(module)):
            found = _dataclass(module, node) if isinstance(node, ast.ClassDef) else None
            if found:
                yield found


def has_arrays(found: Found) -> bool:
    """Whether a comparison of the fields would compare arrays."""
    return any(_reaches_array(found.module, each, frozenset()) for each in found.fields.values())


def _reaches_array(module: str, annotation: ast.AST, seen: frozenset[tuple[str, str]]) -> bool:
    return any(_is_array(module, name, seen) for name in _named(annotation))


def _named(annotation: ast.AST) -> Iterator[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _is_array(module: str, name: str, seen: frozenset[tuple[str, str]]) -> bool:
    if name in ARRAYS:
        return True
    what = _names(module).get(name)
    if what is None or (module, name) in seen:
        return False
    seen |= {(module, name)}
    if isinstance(what, tuple):
        return _is_array(*what, seen)
    if isinstance(what, ast.ClassDef):
        inner = _dataclass(module, what)
        return (
            inner is not None and inner.compares and any(_reaches_array(module, a, seen) for a in inner.fields.values())
        )
    return _reaches_array(module, what, seen)


def reached(things: Iterable[Any]) -> dict[type, Any]:
    """The first instance of each dataclass that a user reaches by public attributes, lists, tuples and mappings."""
    firsts: dict[type, Any] = {}
    waiting = list(things)
    seen: dict[int, Any] = {}  # which keeps them, so that no two have one id
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if std.is_dataclass(thing) and type(thing).__module__.startswith("tlcapture"):
            firsts.setdefault(type(thing), thing)
        waiting.extend(_parts(thing))
    return firsts


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        yield from thing.values()
    elif isinstance(thing, list | tuple):
        yield from thing[:5]
    elif type(thing).__module__.startswith("tlcapture"):
        own = {field.name for field in std.fields(thing)} if std.is_dataclass(thing) else set()
        for kind in type(thing).__mro__:
            own |= {name for name, member in vars(kind).items() if isinstance(member, property | cached_property)}
        yield from (getattr(thing, name) for name in own if not name.startswith("_"))
