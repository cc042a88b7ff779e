"""The interventions and hooks that were active while a capture was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.commands.prompt_files.replay import as_prompt
from tlcapture.generation.interventions.intervention import HookFunction, Intervention
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure
from tlcapture.models.loading import Model
from tlcapture.traits.interventions.records import variant_name
from tlcapture.traits.interventions.resolved import ResolvedIntervention
from tlcapture.views.cache import Cache


@dataclass(frozen=True)
class AppliedInterventions:
    """Changes to a model while it runs: interventions along vectors, and the user's own hooks.

    `records` are their entries in metadata.
    """

    resolved: tuple[ResolvedIntervention, ...] = ()
    hooks: tuple[tuple[str, HookFunction], ...] = ()

    def changes(self) -> list[Intervention]:
        """The changes to activations."""
        return [change for each in self.resolved for change in each.interventions()]

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The entries in metadata; hooks are recorded by name, and cannot be replayed."""
        own = [
            {"kind": "hook", "hook": name, "function": _name_of(function), "replayable": False}
            for name, function in self.hooks
        ]
        return [*(each.record for each in self.resolved), *own]

    def forced(self, model: Model, capture: Capture, names: Sequence[str]) -> Cache:
        """Activations of a pass over the tokens of a capture under the interventions: `[n_tokens, ...]` by name."""
        prompt, changes = as_prompt(capture, capture.prompt_id), self.changes()
        outcome = next(generate(model, [prompt], hooks=names, interventions=changes, own_hooks=self.hooks))
        if isinstance(outcome, Failure):
            raise outcome.error(f"{capture.capture_set}/{capture.prompt_id}: {outcome.reason}")
        return outcome.cache

    def variant(self, name: str | None) -> str | None:
        """The variant of the captures: the given name, or one made from the interventions; `None` without any."""
        return name or (variant_name(self.records) if self.records else None)


NO_INTERVENTIONS = AppliedInterventions()


def _name_of(function: Any) -> str:
    function = getattr(function, "func", function)  # of a partial
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
