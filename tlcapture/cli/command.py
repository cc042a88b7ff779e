"""Commands whose help is in groups with examples, and whose options may come from a `tlcapture.toml`.

    @command("tlcapture project --experiment my_exp --prompt-set single_trait")
    def project() -> None: ...

The file lies in the root. Its keys are the names of options: those at its top are for every command with such an
option, those in a table such as `[capture]` for that command alone. The command line and environment variables win.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any

import click

from tlcapture.cli.streams import lasting_streams
from tlcapture.errors import TlcaptureError
from tlcapture.text import decoded, did_you_mean

SETTINGS = "tlcapture.toml"
_OTHER = "Options"
# The groups of the help, in their order, and the options of all commands that belong to them.
GROUPS: Mapping[str, frozenset[str]] = {
    title: frozenset(names.replace(",", " ").split())
    for title, names in {
        _OTHER: """against_steering, budget, convention, efficiency, gpu, judge, judge_model, measure, no_browser,
            port, read_only, search, tokens_per_second, trait""",
        "Where": "experiment, root, to",
        "What to run": """prompt_set, all_prompt_sets, prompt, prompt_file, system_prompt, chat_template, thinking,
            template_arg, limit, shard, replay, responses_from, skip_existing, overwrite, dry_run, examples,
            examples_as, position, prompts, prompt_tokens, new_tokens, dynamics_only, centered, no_kl""",
        "What to keep": """attention, logit_lens, layer_internals, capture_attn, layers, points, tokens, save_dtype,
            no_project, projections_only, format, attention_layers, lens_layers, lens_top, views, activations,
            shard_size""",
        "Trait vectors": "traits, methods, component, layer, method, vector_experiment, vectors_of",
        "Sampling": """max_new_tokens, temperature, sampling, seed, samples, top_p, top_k, min_p, repetition_penalty,
            stop""",
        "Interventions": "steer, ablate, cap, variant, adapter, coefficients",
        "Model": "model, revision, allow_model_change, engine, device, n_devices, dtype, no_check, batch_size",
        "Cluster": "executor, ray_address, workers, gpus_per_worker, cpus_per_worker, collect",
        "Output": "verbose, quiet, log_file, as_json, fsync, plot, export, png, max_size",
    }.items()
}
_NAMES = {"json": "as_json", "vectors": "vectors_of"}  # parameters that are not named like their option
_STORED = re.compile(r"-?\d{10,}<=x<=\d{10,}")  # limits that only say how a number is stored


def help_settings() -> dict[str, Any]:
    """Settings of all commands: `-h`, and help as wide as the terminal."""
    return {"help_option_names": ["-h", "--help"], "max_content_width": shutil.get_terminal_size().columns}


class _Printing(click.Command):
    """A command that continues even if its output cannot be written, and whose help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any):
        options.setdefault("context_settings", help_settings())
        super().__init__(*args, **options)
        self.examples = tuple(examples)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; exits with status 1 where its output was lost."""
        with lasting_streams():
            return super().main(*args, **options)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{' ' * formatter.current_indent}{example}\n")


class Command(_Printing):
    """A command whose help is in groups, and whose options may come from `tlcapture.toml`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line, with the values of `tlcapture.toml` in place of defaults."""
        from tlcapture.storage.object_stores import is_url

        try:
            os.getcwd()
        except OSError:
            raise click.UsageError("the current folder does not exist any more: change to another one") from None
        named = _named_root(args)
        if not (is_url(named) and set(args) & set(ctx.help_option_names)):  # help needs no remote root
            ctx.default_map = {**(ctx.default_map or {}), **settings_of(_root(named), self, ctx)}
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their groups, with `--help` at the end of the last one."""
        for title, records in grouped_options(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(records)


class Group(_Printing, click.Group):
    """Commands by name; a mistyped name is answered by a suggestion."""

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The named command; fails for an unknown name."""
        name, names = args[0], self.list_commands(ctx)
        if name not in names and not name.startswith("-"):
            hint = did_you_mean(name, names) or f": commands: {', '.join(names)}"
            ctx.fail(f"no such command {name!r}{hint}")
        return super().resolve_command(ctx, args)


def command(
    *examples: str, name: str | None = None, cls: type[Command] = Command
) -> Callable[[Callable[..., Any]], Command]:
    """A decorator that turns a function into a `Command` (or a `cls`), with examples for the end of its help."""
    return click.command(name, cls=cls, examples=examples)


def grouped_options(command: click.Command, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
    """The options of a command with their help, by group; `--help` comes last."""
    group_of = {name: title for title, names in GROUPS.items() for name in names}
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
    last = _OTHER
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None and isinstance(param, click.Option):  # arguments are in the text above
            title = last if param is command.get_help_option(ctx) else group_of.get(str(param.name), _OTHER)
            rows[title].append((record[0].replace(" RANGE", ""), _without_storage(record[1])))
            last = max(last, title, key=list(rows).index)
    return {title: found for title, found in rows.items() if found}


def settings_of(root: Path, of: click.Command, ctx: click.Context) -> dict[str, Any]:
    """The values in a root's `tlcapture.toml` for a command; empty without such a file.

    Raises `click.UsageError` for a file that cannot be read, and for a key that is not an option of the command
    or, at the top, of any command.
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
        name = _name(key)
        if not isinstance(value, dict):
            if name in options:
                found[name] = _as_given(value, options[name])
            elif name not in _all_options():
                raise _no_such(path, key, _all_options())
    command_name, own = _own_table(tables, ctx)
    for key, value in own.items():
        if _name(key) not in options:
            raise _no_such(path, key, options, f"'tlcapture {command_name}'")
        found[_name(key)] = _as_given(value, options[_name(key)])
    for name, value in found.items():
        if "\0" in "".join(value if isinstance(value, list) else [str(value)]):
            raise click.UsageError(f"{path}: {name}: expected text without NUL characters")
    return found


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    from tlcapture.storage.remote_roots import local

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


def _all_options() -> frozenset[str]:
    """The names of the options of all commands."""
    return frozenset().union(*GROUPS.values())


def _no_such(path: Path, key: str, options: Mapping[str, Any] | frozenset[str], of: str = "any command") -> Exception:
    shown = {name: option for option, name in _NAMES.items()}
    names = [shown.get(option, option).replace("_", "-") for option in options]
    hint = did_you_mean(key.replace("_", "-"), names)
    return click.UsageError(f"{path}: {key!r} is not an option of {of}{hint}")


def _name(key: str) -> str:
    return _NAMES.get(key, key.replace("-", "_"))


def _as_given(value: Any, option: click.Option) -> Any:
    """A value of the file as on the command line: a list is comma-separated, or the option is repeated."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [str(each) for each in value] if option.multiple else ",".join(map(str, value))
    return [str(value)] if option.multiple else str(value)


def _named_root(args: Sequence[str]) -> str:
    """The root named on a command line that is not parsed yet: the settings file is read from there."""
    named = os.environ.get("TLCAPTURE_ROOT") or "."
    for index, word in enumerate(args):
        if word == "--root" and index + 1 < len(args):
            named = args[index + 1]
        elif word.startswith("--root="):
            named = word.removeprefix("--root=")
    return named


def _root(named: str) -> Path:
    from tlcapture.storage.remote_roots import root_folder

    try:
        return root_folder(named)
    except TlcaptureError as error:
        raise click.UsageError(str(error)) from None


def _without_storage(text: str) -> str:
    """A help text without limits that only reflect how a number is stored."""
    return re.sub(r"\s*\[(?:;\s*)*\]|;\s*(?=\])|(?<=\[);\s*", "", _STORED.sub("", text))
