"""The interventions of a capture: with their vectors, under a variant of their own, and never mixed with others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.prompt_files.known_files import KnownFiles
from tlcapture.errors import InputError, StorageError
from tlcapture.generation.typical_norms import NORMS_MEASURED, norms_over_prompts
from tlcapture.models.loading import Model
from tlcapture.names import check_name, variant_of
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.runs.existing_files import OVERWRITE
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.interventions.records import described, identity, variant_name
from tlcapture.traits.interventions.resolved import ResolvedIntervention, resolve

_LONGEST_VARIANT = 64


def with_vectors(options: CaptureOptions, layout: Layout, load: ModelLoader) -> CaptureOptions:
    """The options with the experiment and vectors that they stand for, and with the name of the variant.

    The packaged vectors are taken if the experiment has none and they fit the model. Vectors of interventions are read.
    Options that are complete already are not changed.

    Raises:
        InputError: a trait, a layer or the variant's name is wrong, or a replay is given interventions.
        VectorError: a layer has no vector, or one of another width.
    """
    named, own = options.variant, _variant_of_adapter(options)
    if options.variant is not None and len(check_name(options.variant, "variant")) > _LONGEST_VARIANT:
        raise InputError(f"--variant {options.variant}: at most {_LONGEST_VARIANT} characters")
    options = replace(options, variant=named or own)
    if options.projects:
        options = replace(options, vectors=options.vectors.or_packaged(layout, load.name))
    if not options.interventions or options.resolved:
        return options
    if options.replay:
        raise InputError(
            "--replay applies the interventions that captures were made with: leave out --steer, --ablate and --cap, "
            "and name the captures with --variant"
        )
    measures, choice = load.outline.measures, options.vectors
    resolved = resolve(
        options.interventions,
        choice.layout(layout),
        n_layers=measures.n_layers,
        d_model=measures.d_model,
        model=load.name,
        method=choice.method,
    )
    parts = (own, variant_name([each.record for each in resolved]))
    return replace(options, resolved=resolved, variant=named or "_".join(filter(None, parts))[:_LONGEST_VARIANT])


def _variant_of_adapter(options: CaptureOptions) -> str | None:
    """The name of an adapter's folder, as the name of a variant; `None` without an adapter."""
    if options.adapter is None:
        return None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(options.adapter).expanduser().resolve().name).lstrip(".-")
    return name[:_LONGEST_VARIANT] or "adapter"


def with_norms(
    resolved: tuple[ResolvedIntervention, ...],
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    batch_size: int | None,
    tell: Callable[[str], object],
) -> tuple[ResolvedIntervention, ...]:
    """Interventions, whose typical norms are measured on prompts where the vectors have none."""
    layers = sorted({layer for each in resolved if each.lacks_norms for layer in each.layers})
    if not layers:
        return resolved
    tell(NORMS_MEASURED)
    norms = norms_over_prompts(model, prompts, layers, batch_size)
    return tuple(each.with_norms(norms) for each in resolved)


def check_same_interventions(files: KnownFiles, options: CaptureOptions) -> None:
    """Raise `InputError` if a variant holds captures under other interventions and is not to be overwritten.

    Also raised if they were made with another adapter, or from the tokens of other captures.
    """
    capture_set = files.capture_set
    if variant_of(capture_set) is None or options.replay or options.overwrite:
        return
    asked = identity(options.intervention_records)
    for metadata in _metadata_of(files):
        if (held := _made_otherwise(metadata, options, asked)) is not None:
            raise InputError(f"{capture_set} holds captures {held}: choose another --variant, or {OVERWRITE}")


def _made_otherwise(metadata: Mapping[str, Any], options: CaptureOptions, asked: object) -> str | None:
    """How a capture was made, by its metadata, if not as is asked for; `asked` identifies the interventions."""
    if identity(metadata.get("interventions")) != asked:
        held = "; ".join(map(described, metadata.get("interventions") or ())) or "no intervention"
        return f"under other interventions ({held})"
    if (adapter := metadata.get("adapter")) != options.adapter:
        return f"with adapter {adapter or 'none'}"
    source = _source(metadata)
    if (source is None) != (options.responses_from is None):
        return f"with responses from {source or 'none'}"
    return None


def _source(metadata: Mapping[str, Any]) -> str | None:
    """The experiment that a capture's tokens come from; `None` if they were generated."""
    source = metadata.get("tokens_from")
    return None if source is None else str(source.get("inference_experiment", "other captures"))


def _metadata_of(files: KnownFiles) -> Iterator[Mapping[str, Any]]:
    """Metadata of the readable captures of a set, and of one capture that was only projected."""
    layout, capture_set = files.layout, files.capture_set
    captured = dict.fromkeys(layout.captured(capture_set))
    for prompt_id in captured:
        with suppress(StorageError):  # reported by whoever would replace it
            if (capture := files.of(prompt_id, again=True).capture()) is not None:
                yield capture.metadata
    projected = (each for each in layout.prompt_ids(capture_set) if each not in captured)
    records = (files.of(prompt_id).made_from() for prompt_id in projected)
    yield from (record.metadata for record in islice(filter(None, records), 1))
