"""Whether a trait's vectors are the ones that `extract` would make, decided without the model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tlcapture.errors import StorageError
from tlcapture.extraction.examples import Examples
from tlcapture.extraction.kept_activations import KeptActivations, source_digest
from tlcapture.models.loading import ModelOutline
from tlcapture.storage.config import read_config
from tlcapture.storage.layout import Layout
from tlcapture.traits.vector_files import VectorFiles


def has_vectors(
    layout: Layout,
    examples: Examples,
    component: str,
    methods: Sequence[str],
    layers: Sequence[int],
    *,
    model: str,
    outline: ModelOutline,
    position: str,
    seed: int,
) -> bool:
    """Whether all vectors of a component exist, from these examples, read at this position by the model of this name.

    Without `layers`, vectors at every layer that has the component. A file that cannot be read counts as missing here:
    extracting the trait again reports it.
    """
    files = VectorFiles(layout, examples.trait)
    try:
        made = files.metadata(component)
        kept = KeptActivations.read(layout.example_activations(examples.trait, component)) if made else None
    except StorageError:
        return False
    if kept is None or kept.position != (_usual_position(examples) if position == "auto" else position):
        return False
    measures = outline.measures
    with_attention = measures.n_layers if measures.n_attention_layers is None else measures.n_attention_layers
    count = measures.n_layers if component == "residual" else with_attention
    available = files.available(component)
    return (
        made.get("extraction_model") == kept.model == model
        and (made.get("examples"), made.get("model_fingerprint")) == (kept.examples, kept.fingerprint)
        and kept.source == source_digest(examples, read_config(layout), kept.position)
        and made.get("split") == examples.split_record(seed)
        and made.get("examples_as") == examples.lines_as
        and all({*layers} <= {*available.get(each, ())} & {*made.get("layers", ())} for each in methods)
        and {*methods} <= {*made.get("methods", ())}
        and (bool(layers) or all(len(available[each]) == count for each in methods))
    )


def _usual_position(examples: Examples) -> str:
    """The position that `auto` stands for in most of the examples (see `extraction/readout`)."""
    positions = ["response_mean" if item.example.text is None else "all_mean" for item in examples.items]
    return Counter(positions).most_common(1)[0][0]
