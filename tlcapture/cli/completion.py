"""What the shell completes: experiments, prompt sets, traits. docs/command-line.md says how to switch it on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import CompletionItem


def experiments(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The experiments of the root."""
    from tlcapture.storage.layout import existing_experiments

    return _starting(existing_experiments(_root(ctx)), incomplete)


def prompt_sets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The prompt sets of the root and the package, and those with captures; also after a comma."""
    from tlcapture.storage.datasets import Datasets
    from tlcapture.storage.layout import Layout

    names = Datasets(_root(ctx)).prompt_sets()
    with suppress(Exception):
        names += Layout(_root(ctx), ctx.params["experiment"]).prompt_sets()
    return _listed(names, incomplete)


def traits(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The traits with examples, and those with vectors in the experiment; also after a comma."""
    from tlcapture.storage.datasets import Datasets
    from tlcapture.storage.layout import Layout

    names = list(map(str, Datasets(_root(ctx)).traits()))
    with suppress(Exception):
        names += map(str, Layout(_root(ctx), ctx.params["experiment"]).traits())
    return _listed(names, incomplete)


def _root(ctx: click.Context) -> Path:
    from tlcapture.storage.remote_roots import root_folder

    with suppress(Exception):
        return root_folder(ctx.params.get("root") or os.environ.get("TLCAPTURE_ROOT") or ".")
    return Path(".")


def _listed(names: list[str], incomplete: str) -> list[CompletionItem]:
    """The names that complete the last part of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{each.value}") for each in _starting(names, last)]


def _starting(names: list[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(set(names)) if name.startswith(incomplete)]
