"""Which prompts of a set an experiment has saved. Loads no torch."""

from __future__ import annotations

from tlcapture.errors import InputError
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.missing_captures import no_captures


def saved_prompts(layout: Layout, prompt_set: str, *, dynamics_only: bool = False) -> list[str]:
    """The ids of a prompt set's captures, or with `dynamics_only` also of prompts with projections alone.

    Raises `InputError` if there are none.
    """
    ids = layout.prompt_ids(prompt_set) if dynamics_only else layout.captured(prompt_set)
    if not ids and layout.prompt_ids(prompt_set):
        raise InputError(
            f"prompt set {prompt_set!r} has projections but no captures (--projections-only): capture it again to "
            "project it"
        )
    if not ids:
        raise no_captures(layout, prompt_set, layout.captured_prompt_sets())
    return ids
