"""The type checker of the tests: beartype, taking an int where a float is asked for, as Python does.

jaxtyping's own decorator binds the arguments of every call and checks them twice, which took a third of the time of
the tests. Here beartype checks them once, in functions with arrays in their signature alone (mypy checks the others),
in a scope in which their axes agree, and in the first calls of each test: some tests make ten thousand of one function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, wraps
from inspect import isclass
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_scope = jaxtyping.jaxtyped("context")
_CALLS = 10  # of a function with arrays that are checked in each test


class _Test:
    """The number of the test that runs."""

    number = 0


def begin_test() -> None:
    """Check the first calls of every function again."""
    _Test.number += 1


def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    """`jaxtyping.jaxtyped`, for the functions and dataclasses that the import hook decorates."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if dataclasses.is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
        fn.__init__ = jaxtyped(fn.__init__)
    if not isinstance(fn, FunctionType) or "<locals>" in fn.__qualname__:  # which would be decorated in every call
        return fn
    hints = {name: _resolved(hint, fn) for name, hint in fn.__annotations__.items()}
    if not any(map(_has_array, hints.values())):
        return fn
    fn.__annotations__ = hints
    return _in_scope(check(fn), fn)


def _in_scope(checked: Callable[..., Any], unchecked: Callable[..., Any]) -> Callable[..., Any]:
    test, n_calls = 0, 0

    @wraps(checked)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, n_calls
        if test != _Test.number:
            test, n_calls = _Test.number, 0
        n_calls += 1
        if n_calls > _CALLS:
            return unchecked(*args, **kwargs)
        with _scope:
            return checked(*args, **kwargs)

    return call


def _resolved(hint: Any, fn: FunctionType) -> Any:
    """What an annotation says; `Any` where its names are only imported for type checkers."""

    def annotated() -> None: ...

    annotated.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(annotated, fn.__globals__, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_array(hint: Any) -> bool:
    return (isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_has_array, get_args(hint)))


jaxtyping.jaxtyped = jaxtyped  # what the import hook decorates with
