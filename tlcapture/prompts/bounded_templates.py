"""Bounds on the result of a single operation in a chat template, which `step_limit` cannot interrupt.

transformers renders templates in jinja's sandbox, which bounds `range` alone: `{{ 10 ** 10 ** 9 }}` would take all
memory and never end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import BuiltinFunctionType
from typing import Any

from tlcapture.prompts.step_limit import StepLimitError

MOST = 100_000_000  # characters or items, some twenty times the longest context of a published model
_MOST_BITS = 1_000_000  # of a whole number
_OPERATORS = frozenset({"**", "*", "+", "%"})
_PADDING = frozenset({"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"})  # methods with a width
_FIELDS = re.compile(r"%(?:\([^)]*\))?[-+ #0-9.*]+|\{[^{}]*:[^{}]*\{?")  # of `%` and of `format`, up to their type
_NUMBERS = re.compile(r"\d+")


class TooLargeError(StepLimitError):
    """An operation would make a text, a list or a number that is too large."""


@cache
def bound_templates() -> None:
    """Have transformers render chat templates in a sandbox that refuses such operations, by `TooLargeError`."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.runtime import Context, str_join
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    class BoundedCode(CodeGenerator):
        """Joins the operands of `~` by the environment."""

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
            self.write("environment.joined((")
            for each in node.nodes:
                self.visit(each, frame)
                self.write(", ")
            self.write("))")

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = _OPERATORS
        code_generator_class = BoundedCode

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.filters = _Filters(self.filters)

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            _check(_size_of_operation(operator, left, right))
            return super().call_binop(context, operator, left, right)

        def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
            _check(_size_of_call(function, [*args, *options.values()]))
            return super().call(context, function, *args, **options)

        def concat(self, parts: Iterable[str]) -> str:
            texts = list(parts)
            _check(sum(map(len, texts)))
            return "".join(texts)

        def joined(self, parts: Sequence[Any]) -> str:
            return self.concat([str_join((each,)) for each in parts])

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, each with a bound, including filters that are added later."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]):
        super().__init__({name: _bounded(name, each) for name, each in filters.items()})

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _bounded(name, function))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name not in _SIZES_OF_FILTERS:
        return function
    n_hidden = int(hasattr(function, "jinja_pass_arg"))  # the environment or context, in front of the value

    @wraps(function)
    def bounded(*args: Any, **options: Any) -> Any:
        _, value, *others = [None, *args[n_hidden:]]
        _check(_SIZES_OF_FILTERS[name](value, [*others, *options.values()]))
        return function(*args, **options)

    return bounded


def _check(size: int) -> None:
    if size > MOST:
        raise TooLargeError(f"makes more than {MOST:,} characters, items or digits in one operation")


def _size_of_operation(operator: str, left: Any, right: Any) -> int:
    if operator == "%":
        return _widest(left, right if isinstance(right, tuple) else [right]) if isinstance(left, str) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        return 0 if operator == "+" else bits * (MOST // _MOST_BITS)
    if operator == "*":
        return _length(left) * _count(right) + _length(right) * _count(left)
    return _length(left) + _length(right)


def _size_of_call(function: Any, args: Sequence[Any]) -> int:
    """The size of the result of a method of a text or number."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
    value = method.__self__ if isinstance(method, BuiltinFunctionType) else None
    if not isinstance(value, str | bytes | int):
        return 0
    if method.__name__ in ("format", "format_map"):
        values = [each for arg in args for each in (arg.values() if isinstance(arg, dict) else [arg])]
        return _widest(str(value), values)
    if method.__name__ in ("join", "replace"):
        return _SIZES_OF_FILTERS[method.__name__](*((args[0], [value]) if method.__name__ == "join" else (value, args)))
    return _largest(args) if method.__name__ in _PADDING else 0


def _widest(text: str, values: Iterable[Any]) -> int:
    """The width of the widest field of a text for `%` or `format`, which may be one of the values."""
    fields = _FIELDS.findall(text)
    widths = [int(digits[:20]) for field in fields for digits in _NUMBERS.findall(field)]
    return max(_largest(widths), _largest(values) if any("*" in each or each.endswith("{") for each in fields) else 0)


def _replaced(value: Any, others: Sequence[Any]) -> int:
    old, new = map(str, others[:2]) if len(others) > 1 else ("", "")
    return str(value).count(old) * len(new) if old else (_length(value) + 1) * len(new)


_SIZES_OF_FILTERS: dict[str, Callable[[Any, Sequence[Any]], int]] = {
    "batch": lambda value, others: _largest(others),
    "center": lambda value, others: _largest(others),
    "format": lambda value, others: _widest(str(value), others),
    "indent": lambda value, others: _largest(others) * (str(value).count("\n") + 1),
    "join": lambda value, others: _length(value) * max(map(_length, others), default=0),
    "replace": _replaced,
    "round": lambda value, others: 4 * _largest(others) * (MOST // _MOST_BITS),
    "tojson": lambda value, others: _largest(others) * 1000,
}


def _largest(values: Iterable[Any]) -> int:
    return max(map(_count, values), default=0)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _count(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0
