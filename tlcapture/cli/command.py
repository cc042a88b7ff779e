"""Commands whose help is in groups with examples.

    @command("tlcapture project --experiment my_exp --prompt-set single_trait")
    def project() -> None: ...

Their options take values of `tlcapture.toml` in place of defaults (`settings_file`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from tlcapture.cli.output.streams import lasting_streams
from tlcapture.cli.settings_file import root_argument, root_path, settings_of
from tlcapture.text import did_you_mean

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
ALL_OPTIONS: frozenset[str] = frozenset().union(*GROUPS.values())
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

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse a command line; the context prints no colours where `NO_COLOR` is set."""
        if os.environ.get("NO_COLOR"):
            extra["color"] = False
        return super().make_context(info_name, args, parent, **extra)

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
        try:
            ctx.default_map = {**(ctx.default_map or {}), **self._settings(ctx, args)}
        except click.UsageError:
            if not ctx.resilient_parsing:  # which it is while the shell completes
                raise
        return super().parse_args(ctx, args)

    def _settings(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        from tlcapture.storage.remote.object_stores import is_url

        try:
            os.getcwd()
        except OSError:
            raise click.UsageError("the current folder does not exist any more: change to another one") from None
        root = root_argument(args)
        if is_url(root) and set(args) & set(ctx.help_option_names):  # help needs no remote root
            return {}
        return settings_of(root_path(root), self, ctx, ALL_OPTIONS)

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
        if name not in names and not name.startswith("-") and not ctx.resilient_parsing:
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


def _without_storage(text: str) -> str:
    """A help text without limits that only reflect how a number is stored."""
    return re.sub(r"\s*\[(?:;\s*)*\]|;\s*(?=\])|(?<=\[);\s*", "", _STORED.sub("", text))
