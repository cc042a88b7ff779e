"""Forward passes over the tokens of saved captures, in batches, for add-ons that need more than their activations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlcapture.captures.capture import Capture
from tlcapture.commands.capture_outputs import Outputs
from tlcapture.commands.kept_positions import wanted_positions
from tlcapture.errors import InputError
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Outcome
from tlcapture.models.loading import Model
from tlcapture.names import PromptId
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.traits.resolved_interventions import ResolvedIntervention, of_records


@dataclass(frozen=True)
class Pass:
    """What sequences that run together have in common: the activations that are wanted, and the interventions."""

    hooks: tuple[str, ...]
    interventions: tuple[ResolvedIntervention, ...] = ()


class InterventionsAgain:
    """The interventions that captures were made with, to apply them again; those of equal records are the same."""

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
    if wanted.logit_lens and not capture.kept.has_all_outputs:
        raise InputError(
            f"the logit lens needs residual_out of every layer, but {capture.kept.described()}: "
            "capture it again with --logit-lens"
        )
    if wanted.logit_lens and not capture.positions.includes(wanted_positions(wanted.tokens, capture, fresh=False)):
        raise InputError(
            f"the logit lens needs residual_out of the tokens that it is kept of, but only "
            f"{capture.positions.described()}: leave out --tokens, or capture it again with --logit-lens"
        )


def as_prompt(capture: Capture, prompt_id: PromptId) -> TokenizedPrompt:
    """The prompt of a capture, with its response as a given one."""
    text, ids, given = capture.prompt.text, tuple(capture.prompt.token_ids), tuple(capture.response.token_ids)
    opening = _opening(capture)
    return TokenizedPrompt(
        capture.prompt_set, prompt_id, text, text, ids, None, chat_template=False, opening=opening, given=given
    )


def _opening(capture: Capture) -> str:
    """The end of the prompt, after the last turn that is not the assistant's."""
    n_prompt = len(capture.prompt.tokens)
    ends = [span.found[1] for span in capture.spans if span.kind == "turn" and span.role != "assistant" and span.found]
    return "".join(capture.prompt.tokens[max((end for end in ends if end <= n_prompt), default=0) :])


def replayed(
    model: Model, sequences: Mapping[Pass, Sequence[TokenizedPrompt]], batch_size: int | None
) -> Iterator[Outcome]:
    """Run sequences, given by what is wanted of their passes, in batches of similar length.

    The cache of each outcome holds these activations at every token; `batch_size` is as in `generate`.
    """
    for wanted, prompts in sequences.items():
        changes = [change for each in wanted.interventions for change in each.interventions()]
        yield from generate(model, prompts, hooks=wanted.hooks, interventions=changes, batch_size=batch_size)
