"""Forward passes over the tokens of saved captures, in batches, for add-ons that need more than their activations."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.commands.prompt_files.outputs import Outputs, wanted_positions
from tlcapture.errors import InputError
from tlcapture.generation.interventions.intervention import Intervention
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure, Outcome
from tlcapture.generation.recording.pattern_spools import Spooling
from tlcapture.generation.recording.recorder import Together
from tlcapture.models.loading import Model
from tlcapture.models.memory import batch_bytes, free_memory
from tlcapture.names import PromptId
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.text import REPLACEMENT, dtype_name, layers_named
from tlcapture.traits.interventions.resolved import ResolvedIntervention, of_records
from tlcapture.views.hooks import is_pattern


@dataclass(frozen=True)
class Pass:
    """What sequences that run together share: the wanted activations, and the interventions."""

    hooks: tuple[str, ...]
    interventions: tuple[ResolvedIntervention, ...] = ()


class InterventionsAgain:
    """The interventions that captures were made with, to apply them again; equal records share one object."""

    def __init__(self, root: Path):
        self._root = root
        self._found: dict[str, tuple[ResolvedIntervention, ...]] = {}

    def of(self, capture: Capture) -> tuple[ResolvedIntervention, ...]:
        """The interventions of a capture; raises `InputError` or `VectorError` where they cannot be applied again."""
        records = capture.metadata.get("interventions") or ()
        key = json.dumps(records, sort_keys=True)
        if key not in self._found:
            self._found[key] = of_records(records, self._root)
        return self._found[key]


def check_replayable(capture: Capture, wanted: Outputs, model: Model) -> None:
    """Raise `InputError` for a capture of another model, and for one that lacks what its logit lens needs."""
    fingerprint = capture.metadata.get("model_fingerprint")
    if fingerprint != model.fingerprint:
        raise InputError(
            f"captured from {capture.metadata.get('inference_model')!r} (fingerprint {fingerprint}), not from "
            f"{model.name!r} ({model.fingerprint}): replay it with the same model"
        )
    if wanted.logit_lens and not capture.kept.has_outputs(wanted.parts.lens_layers):
        which = f"{layers_named(wanted.parts.lens_layers)}" if wanted.parts.lens_layers else "every layer"
        raise InputError(
            f"the logit lens needs residual_out of {which}, but {capture.kept.described()}: "
            "capture it again with --logit-lens"
        )
    if wanted.logit_lens and not capture.positions.includes(wanted_positions(wanted.tokens, capture, fresh=False)):
        only = "only " if capture.positions.kept else ""
        raise InputError(
            f"the logit lens needs residual_out of the tokens to keep, but {only}{capture.positions.described()}: "
            "leave out --tokens, or capture it again with --logit-lens"
        )


def other_rounding(capture: Capture, model: Model) -> str | None:
    """The warning for a capture that was made on another engine or in another dtype; `None` if it was not."""
    made = (capture.metadata.get("engine"), capture.metadata.get("dtype"))
    runs = (model.engine, dtype_name(model.dtype))
    if None in made or made == runs:
        return None
    captured, read = (f"on {engine} in {dtype}" for engine, dtype in (made, runs))
    return f"{capture.capture_set}: captured {captured}, read again {read}: they differ by rounding"


def as_prompt(capture: Capture, name: PromptId) -> TokenizedPrompt:
    """The prompt of a capture, named like the capture, with its response as a given one."""
    text, ids, given = capture.prompt.text, tuple(capture.prompt.token_ids), tuple(capture.response.token_ids)
    templated = bool(capture.metadata.get("chat_template"))
    return TokenizedPrompt(
        capture.prompt_set,
        name,
        text,
        text,
        ids,
        None,
        chat_template=templated,  # it decides which tokens are thinking
        opening=_opening(capture) if templated else "",
        thinks=any(span.kind == "thinking" for span in capture.spans),
        given=given,
    )


def _opening(capture: Capture) -> str:
    """The end of the prompt, after the last turn that is not the assistant's."""
    n_prompt = len(capture.prompt.tokens)
    ends = [span.found[1] for span in capture.spans if span.kind == "turn" and span.role != "assistant" and span.found]
    texts = "".join(capture.prompt.tokens[max((end for end in ends if end <= n_prompt), default=0) :])
    # Tokens that are parts of a character have no text of their own.
    pattern = ".+?".join(map(re.escape, re.split(f"{REPLACEMENT}+", texts)))
    found = re.fullmatch(f".*({pattern})", capture.prompt.text, re.DOTALL) if REPLACEMENT in texts else None
    return texts if found is None else found[1]


def one_layer_at_a_time(hooks: Sequence[str]) -> list[Sequence[str]]:
    """The hooks of as many passes as there are patterns, each of one pattern; the first has all other hooks too."""
    others, patterns = ([name for name in hooks if is_pattern(name) == of] for of in (False, True))
    return [[*others, *patterns[:1]], *([name] for name in patterns[1:])]


def _passes(model: Model, hooks: Sequence[str], n_tokens: int, spooling: Spooling) -> list[Sequence[str]]:
    """The hooks of each pass over a sequence: all of them together if they fit in half of what is free."""
    free = free_memory(model.device)

    def fits(names: Sequence[str]) -> bool:
        return 2 * batch_bytes(model, n_tokens, names, spooled_above=spooling.above).on_device(1) <= free

    groups: list[Sequence[str]] = []
    for names in [hooks] if fits(hooks) else one_layer_at_a_time(hooks):
        if groups and fits([*groups[-1], *names]):
            groups[-1] = [*groups[-1], *names]
        else:
            groups.append(names)
    return groups


def _read_in_passes(
    model: Model,
    prompt: TokenizedPrompt,
    groups: Sequence[Sequence[str]],
    spooling: Spooling,
    changes: Sequence[Intervention],
) -> Outcome:
    found = []
    for hooks in groups:
        (outcome,) = generate(model, [prompt], hooks=hooks, interventions=changes, batch_size=1, spooling=spooling)
        if isinstance(outcome, Failure):
            return outcome
        found.append(outcome)
    return replace(found[0], cache=Together([outcome.cache for outcome in found]))


def replayed(
    model: Model,
    sequences: Mapping[Pass, Sequence[TokenizedPrompt]],
    batch_size: int | None,
    spooling: Spooling | None = None,
    wanted: Collection[PromptId] | None = None,
) -> Iterator[Outcome]:
    """Run sequences in batches of similar length; sequences that want the same of their passes come together.

    The cache of each outcome holds these activations at every token; the other arguments are as in `generate`.
    A sequence whose patterns do not fit in memory while it is read is read several times, some layers each time.
    """
    for shared, prompts in sequences.items():
        changes = [change for each in shared.interventions for change in each.interventions()]
        if spooling is not None and any(map(is_pattern, shared.hooks)):
            together = []
            for prompt in prompts:
                groups = _passes(model, shared.hooks, len(prompt.read_ids), spooling)
                if len(groups) == 1:
                    together.append(prompt)
                elif wanted is None or prompt.name in wanted:
                    yield _read_in_passes(model, prompt, groups, spooling, changes)
            prompts = together
        if prompts:
            yield from generate(
                model,
                prompts,
                hooks=shared.hooks,
                interventions=changes,
                batch_size=batch_size,
                wanted=wanted,
                spooling=spooling,
            )
