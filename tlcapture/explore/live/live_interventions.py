"""Interventions on live captures: trait interventions, the user's own hooks, and runs of the same tokens again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.commands.capturing.interventions import with_norms
from tlcapture.commands.prompt_files.replay import as_prompt
from tlcapture.errors import InputError
from tlcapture.explore.applied_interventions import AppliedInterventions
from tlcapture.explore.captured_sets import Captures
from tlcapture.explore.explorable_capture import ExplorableCapture
from tlcapture.generation.interventions.intervention import HookFunction
from tlcapture.models.loading import Model
from tlcapture.prompts.known_tokens import KnownTokens
from tlcapture.prompts.tokenization import TokenizedPrompt, token_texts
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.interventions.records import thinking_doubt
from tlcapture.traits.interventions.requested import TraitIntervention
from tlcapture.traits.interventions.resolved import resolve

Hook = tuple[str | Callable[[str], bool], HookFunction]

_log = logging.getLogger(__name__)


def live_interventions(
    model: Model,
    interventions: Iterable[TraitIntervention],
    hooks: Iterable[Hook],
    vectors: Layout | None,
    prompts: Sequence[TokenizedPrompt],
    batch_size: int | None,
) -> AppliedInterventions:
    """Resolve interventions to their vectors and norms, and hooks to the model's.

    Typical norms are those stored with the vectors, or the medians over all tokens of the prompts, unsteered.

    Raises:
        InputError: something is not an intervention or hook, a trait or layer is unknown, or `vectors` are needed.
        VectorError: a layer has no vector, or one of another width.
    """
    asked = [interventions] if isinstance(interventions, TraitIntervention) else list(interventions)
    for each in asked:
        if not isinstance(each, TraitIntervention):
            raise InputError(f"interventions: expected Steer(...), Ablate(...) or Cap(...), got {each!r}")
    resolved = resolve(asked, vectors, n_layers=model.n_layers, d_model=model.d_model, model=model.name)
    of_thinking = thinking_doubt([each.record for each in resolved], thinks=any(prompt.thinks for prompt in prompts))
    for doubt in (*(doubt for each in resolved for doubt in each.doubts), of_thinking):
        if doubt is not None:
            _log.warning(doubt)
    resolved = with_norms(resolved, model, prompts, batch_size, _log.info)
    return AppliedInterventions(resolved, tuple(_own_hooks(model, hooks)))


def given_captures(prompts: Any) -> list[Capture] | None:
    """The captures whose tokens are to be run again; `None` if the prompts are not captures.

    Raises `InputError` for captures mixed with other prompts.
    """
    if isinstance(prompts, Captures):
        given: list[Any] = list(prompts.values())
    elif isinstance(prompts, Capture | ExplorableCapture):
        given = [prompts]
    else:
        given = list(prompts) if isinstance(prompts, list | tuple) else []
    are_captures = [isinstance(each, Capture | ExplorableCapture) for each in given]
    if not any(are_captures):
        return None
    if not all(are_captures):
        raise InputError("expected captures, whose tokens are run again, or prompts, but not both at once")
    return [each if isinstance(each, Capture) else each._captured for each in given]


def prompt_of_capture(model: Model, capture: Capture) -> TokenizedPrompt:
    """The prompt of a capture with its response as a given one; raises `InputError` for another tokenizer."""
    if token_texts(model.tokenizer, capture.token_ids) != capture.tokens:
        raise InputError(
            f"{capture.capture_set}/{capture.prompt_id}: its tokens come from another tokenizer than "
            f"{model.name}'s: expected a model with the tokenizer of {capture.metadata['inference_model']}"
        )
    return as_prompt(capture, capture.prompt_id)


def of_the_same_tokens(made: Capture, source: Capture) -> Capture:
    """A capture of another capture's tokens, with that one's spans and texts."""
    known = KnownTokens.of(source.metadata, source.spans)
    return replace(made, metadata=known.described(made.metadata), spans=known.spans)


def _own_hooks(model: Model, hooks: Iterable[Hook]) -> Iterable[tuple[str, HookFunction]]:
    for pair in hooks:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
            raise InputError(f"hooks: expected pairs of a hook name and a function, got {pair!r}")
        name, function = pair
        known = [*model.hook_names, *model.tl.hook_dict]
        found = [each for each in model.hook_names if name(each)] if callable(name) else [name]
        if not found or not set(found) <= set(known):
            what = "a name that no hook has" if callable(name) else repr(name)
            raise InputError(f"hooks: the model has no hook {what}: expected one such as 'blocks.0.hook_resid_post'")
        yield from ((each, function) for each in found)
