"""What the shell completes: experiments, prompt sets, traits. docs/command-line.md says how to switch it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, FishComplete, ShellComplete, ZshComplete, add_completion_class

if TYPE_CHECKING:
    from tlcapture.storage.experiments.layout import Layout


class _WholeWords(ShellComplete):
    """For shells whose words do not end at `=`: `--option=value` is completed as one word."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """The completions, those of values with the option in front."""
        option, equals, _ = incomplete.partition("=")
        found = super().get_completions(args, incomplete)
        if not (option.startswith("-") and equals):
            return found
        return [
            CompletionItem(f"{option}={each.value}", help=each.help) if each.type == "plain" else each for each in found
        ]


@add_completion_class
class _Zsh(_WholeWords, ZshComplete):
    pass


@add_completion_class
class _Fish(_WholeWords, FishComplete):
    # Click's script would cut values and descriptions at their first comma.
    source_template = FishComplete.source_template.replace('string split "," ', 'string split --max 1 "," ')


def experiments(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The experiments of the root."""
    from tlcapture.storage.experiments.layout import existing_experiments

    return _starting(_names(lambda: existing_experiments(_root(ctx))), incomplete)


def prompt_sets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The prompt sets of the root and the package, and those with captures; also after a comma."""
    from tlcapture.storage.experiments.datasets import Datasets

    return _listed(_names(lambda: Datasets(_root(ctx)).prompt_sets(), lambda: _layout(ctx).prompt_sets()), incomplete)


def traits(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The traits with examples, and those with vectors in the experiment; also after a comma."""
    from tlcapture.storage.experiments.datasets import Datasets

    return _listed(_names(lambda: Datasets(_root(ctx)).traits(), lambda: _layout(ctx).traits()), incomplete)


def _layout(ctx: click.Context) -> Layout:
    from tlcapture.storage.experiments.layout import Layout

    return Layout(_root(ctx), ctx.params["experiment"])


def _names(*sources: Callable[[], Iterable[object]]) -> list[str]:
    """The names from all sources that can be listed."""
    found: list[str] = []
    for source in sources:
        with suppress(Exception):
            found += map(str, source())
    return found


def _root(ctx: click.Context) -> Path:
    root: Path = ctx.params["root"]  # None where it cannot be read, of which nothing is completed
    return root


def _listed(names: list[str], incomplete: str) -> list[CompletionItem]:
    """The names that complete the last part of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{each.value}") for each in _starting(names, last)]


def _starting(names: list[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]
