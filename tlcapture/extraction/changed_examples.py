"""Whether a trait's examples are still those that its vectors were extracted from, told without a model or torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from tlcapture.errors import InputError
from tlcapture.extraction.examples import AUTO, Example, Examples, read_examples
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets

RECORDED = "examples_in_files"  # in the metadata of vectors


def digest_of(examples: Examples) -> str:
    """A digest of examples as their files state them, 16 hex digits."""
    rows = [[item.positive, *_fields(item.example)] for item in examples.items]
    return blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def _fields(example: Example) -> list[str | None]:
    """What an example's file states; no system prompt where there is none, as in earlier versions."""
    fields = example.model_dump()
    system_prompt = fields.pop("system_prompt")
    return [*fields.values(), *([] if system_prompt is None else [system_prompt])]


def have_changed(datasets: Datasets, trait: Trait, metadata: Mapping[str, Any]) -> bool:
    """Whether a trait's examples are known to differ from the ones that vectors with this metadata were made of.

    Metadata of earlier versions has no digest: examples that were added or removed are still noticed.
    Examples that cannot be read are not known to differ.
    """
    split = metadata.get("split")
    if not isinstance(split, Mapping):
        return False
    seed = split.get("seed") or 0
    try:
        examples = read_examples(datasets, trait, seed=seed, examples_as=metadata.get("examples_as") or AUTO)
    except InputError:
        return False
    if RECORDED in metadata:
        return bool(metadata[RECORDED] != digest_of(examples))
    return any(split[name] != value for name, value in examples.split_record(seed).items() if name in split)
