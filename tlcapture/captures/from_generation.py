"""The capture of a generated response, and whether two captures are of the same computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcapture.captures.capture import Capture, CapturedPart, storage_dtype
from tlcapture.captures.provenance import (
    conversation_record,
    is_same_computation,
    model_record,
    now,
    point_hooks,
    sample_record,
    template_record,
    variant_record,
)
from tlcapture.errors import StorageError
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import Model
from tlcapture.prompts.thinking import response_spans
from tlcapture.prompts.tokenization import TokenizedPrompt, bos_policy, decode, token_texts
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.residual import residual_view


def capture_of(
    generation: Generation,
    model: Model,
    *,
    experiment: str,
    sampling: Sampling,
    max_new_tokens: int,
    attn_out: bool,
    save_dtype: str,
    kept: KeptPoints | None = None,
    variant: str | None = None,
    interventions: Sequence[Mapping[str, Any]] = (),
) -> Capture:
    """The capture of a generation, in the dtype to store it in; `kept` limits it to some layers and points.

    `interventions` are the records of the interventions that were active during generation.
    """
    prompt = generation.prompt
    n_prompt, n_tokens = len(prompt.token_ids), len(generation.token_ids)
    stream = residual_view(
        generation.cache, model.n_layers, attn_out=attn_out, only=kept, with_attention=model.with_attention
    )
    dtype = storage_dtype(stream, save_dtype, model.name)
    texts = token_texts(model.tokenizer, generation.token_ids)
    response_text = decode(model.tokenizer, generation.response_ids)
    spans, markers = response_spans(
        model.tokenizer,
        prompt.opening,
        generation.response_ids,
        texts[n_prompt:],
        n_prompt,
        stopped=generation.stop_reason == "stop_token",
        chat_template=prompt.chat_template,
    )
    metadata = {
        "inference_model": model.name,
        "inference_experiment": experiment,
        "prompt_set": prompt.prompt_set,
        "prompt_id": prompt.id,
        **sample_record(prompt.sample),
        "prompt_text": prompt.source_text,
        **variant_record(variant, interventions),
        **_activations_record(model, stream.kept, attn_out=attn_out),
        **sampling.record(),
        "max_new_tokens": max_new_tokens,
        "stop_reason": generation.stop_reason,
        **_prompt_record(prompt, model, markers),
        "capture_date": now(),
        **({"prompt_fields": dict(prompt.fields)} if prompt.fields else {}),
    }
    all_spans = (*prompt.spans, *spans)
    if prompt.known is not None:
        metadata, all_spans = prompt.known.described(metadata), prompt.known.spans
    return Capture(
        CapturedPart(prompt.text, texts[:n_prompt], list(prompt.token_ids), stream.tokens(0, n_prompt, dtype)),
        CapturedPart(
            response_text, texts[n_prompt:], list(generation.response_ids), stream.tokens(n_prompt, n_tokens, dtype)
        ),
        metadata,
        spans=all_spans,
    )


def _activations_record(model: Model, kept: KeptPoints, *, attn_out: bool) -> dict[str, Any]:
    """The model, and the kept activations, as metadata."""
    return {
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "layers": list(kept.layers),
        "points": list(kept.points),
        **model_record(model),
        "hooks": point_hooks(model, attn_out=attn_out, points=kept.points),
        "parallel_blocks": model.has_parallel_blocks,
        **({} if model.with_attention is None else {"attention_layers": list(model.with_attention)}),
    }


def _prompt_record(prompt: TokenizedPrompt, model: Model, markers: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the prompt was rendered and tokenised, as metadata; `markers` are those of its thinking."""
    return {
        "system_prompt": prompt.system_prompt,
        "chat_template": prompt.chat_template,
        **template_record(prompt.merged, prompt.dropped),
        **conversation_record(prompt.messages, prompt.template_args, markers),
        "bos": bos_policy(model.tokenizer, prompt.token_ids, chat_template=prompt.chat_template),
    }


def is_alike(path: Path, capture: Capture) -> bool:
    """Whether a file holds a capture of the same tokens, computed by the same model in the same way.

    False for a file that is missing or damaged.
    """
    try:
        saved = Capture.open(path)
    except StorageError:
        return False
    return saved.token_ids == capture.token_ids and is_same_computation(saved.metadata, capture.metadata)
