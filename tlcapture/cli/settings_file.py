"""The settings file `tlcapture.toml`, whose values take the place of the defaults of options.

The file lies in the root. Its keys are the names of options: those at its top are for every command with such an
option, those in a table such as `[capture]` for that command alone. The command line and environment variables win.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any

import click

from tlcapture.errors import TlcaptureError
from tlcapture.text import decoded, did_you_mean

SETTINGS = "tlcapture.toml"
_NAMES = {"json": "as_json", "vectors": "vectors_of"}  # parameters that are not named like their option


def settings_of(root: Path, of: click.Command, ctx: click.Context, all_options: frozenset[str]) -> dict[str, Any]:
    """The values in a root's `tlcapture.toml` for a command, by the names of parameters; empty without such a file.

    `all_options` are the parameters of all commands. Raises `click.UsageError` for a file that cannot be read, and for
    a key that is not an option of the command or, at the top, of any command.
    """
    path = root / SETTINGS
    if not lexists(path):
        return {}
    content = _read(path)
    options = {str(param.name): param for param in of.get_params(ctx) if isinstance(param, click.Option)}
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    _check_tables(path, tables, ctx.find_root().command, ctx.find_root())
    found = {}
    for key, value in content.items():
        name = parameter_of(key)
        if not isinstance(value, dict):
            if name in options:
                found[name] = _as_given(value, options[name])
            elif name not in all_options:
                raise _no_such(path, key, all_options)
    command_name, own = _own_table(tables, ctx)
    for key, value in own.items():
        if parameter_of(key) not in options:
            raise _no_such(path, key, options, f"'tlcapture {command_name}'")
        found[parameter_of(key)] = _as_given(value, options[parameter_of(key)])
    for name, value in found.items():
        if "\0" in "".join(value if isinstance(value, list) else [str(value)]):
            raise click.UsageError(f"{path}: {name}: expected text without NUL characters")
    return found


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    from tlcapture.storage.remote.roots import local

    try:
        return tomllib.loads(decoded(local(path).read_bytes()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"{path}: cannot be read: {reason}") from None


def _own_table(tables: Mapping[str, Any], ctx: click.Context) -> tuple[str, Mapping[str, Any]]:
    """The command's name and its table: `[capture]`, or `[traits.list]` for a command of a group."""
    names: list[str] = []
    at: click.Context | None = ctx
    while at is not None and at.parent is not None:
        names.insert(0, str(at.info_name))
        at = at.parent
    found: Any = tables
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return " ".join(names), found if isinstance(found, dict) else {}


def _check_tables(
    path: Path, tables: Mapping[str, Any], group: click.Command, ctx: click.Context, begin: str = ""
) -> None:
    """Raise `click.UsageError` for a table that is not named like a command of a group."""
    commands = group.list_commands(ctx) if isinstance(group, click.Group) else []
    for name, table in tables.items():
        if name not in commands:
            hint = did_you_mean(name, commands)
            raise click.UsageError(f"{path}: [{begin}{name}] is not the name of a command{hint}", ctx=ctx)
        inner = {key: value for key, value in table.items() if isinstance(value, dict)}
        if inner and isinstance(group, click.Group) and (command := group.get_command(ctx, name)) is not None:
            _check_tables(path, inner, command, ctx, f"{name}.")


def _no_such(path: Path, key: str, options: Mapping[str, Any] | frozenset[str], of: str = "any command") -> Exception:
    shown = {name: option for option, name in _NAMES.items()}
    names = [shown.get(option, option).replace("_", "-") for option in options]
    hint = did_you_mean(key.replace("_", "-"), names)
    return click.UsageError(f"{path}: {key!r} is not an option of {of}{hint}")


def parameter_of(key: str) -> str:
    """The parameter of an option, by its name in the file."""
    return _NAMES.get(key, key.replace("-", "_"))


def _as_given(value: Any, option: click.Option) -> Any:
    """A value of the file as on the command line: a list is comma-separated, or the option is repeated."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [str(each) for each in value] if option.multiple else ",".join(map(str, value))
    return [str(value)] if option.multiple else str(value)


def root_argument(args: Sequence[str]) -> str:
    """The root named on a command line that is not parsed yet: the settings file is read from there."""
    named = os.environ.get("TLCAPTURE_ROOT") or "."
    for index, word in enumerate(args):
        if word == "--root" and index + 1 < len(args):
            named = args[index + 1]
        elif word.startswith("--root="):
            named = word.removeprefix("--root=")
    return named


def root_path(named: str) -> Path:
    """The folder of a root; raises `click.UsageError` if it cannot be reached."""
    from tlcapture.storage.remote.roots import root_folder

    try:
        return root_folder(named)
    except TlcaptureError as error:
        raise click.UsageError(str(error)) from None
