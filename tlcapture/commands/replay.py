"""Forward passes over the tokens of saved captures, in batches, for add-ons that need more than their activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tlcapture.captures.capture import Capture
from tlcapture.commands.capture_outputs import Outputs
from tlcapture.commands.kept_positions import wanted_positions
from tlcapture.errors import InputError
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Outcome
from tlcapture.models.loading import Model
from tlcapture.names import PromptId
from tlcapture.prompts.tokenization import TokenizedPrompt


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


def as_prompt(capture: Capture, name: PromptId) -> TokenizedPrompt:
    """Prompt and response of a capture as one prompt, with the capture's name, to which no response is generated."""
    text = capture.prompt.text + capture.response.text
    ids = tuple(capture.token_ids)
    return TokenizedPrompt(capture.prompt_set, name, text, text, ids, None, chat_template=False)


def replayed(
    model: Model, sequences: Mapping[tuple[str, ...], Sequence[TokenizedPrompt]], batch_size: int | None
) -> Iterator[Outcome]:
    """Run sequences, given by the activations that are wanted of each, in batches of similar length.

    The cache of each outcome holds these activations at every token; `batch_size` is as in `generate`.
    """
    for hooks, prompts in sequences.items():
        yield from generate(model, prompts, hooks=hooks, max_new_tokens=0, batch_size=batch_size)
