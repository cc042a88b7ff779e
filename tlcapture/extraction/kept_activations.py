"""The activations that `extract` read, kept beside the vectors so that `evaluate` needs no second pass.

extraction/{category}/{trait}/activations/{component}.pt
    {"activations": [n_layers, n_examples, d_model], "n_tokens": [n_examples], "texts": [str], "examples": digest,
     "source": digest, "model", "fingerprint", "position"}
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import torch

from tlcapture.errors import StorageError
from tlcapture.extraction.examples import Examples
from tlcapture.extraction.readout import Activations
from tlcapture.storage.experiments.config import ExperimentConfig
from tlcapture.storage.files import Written, read_tensors, write_tensors
from tlcapture.storage.tensors import is_plain


@dataclass(frozen=True, eq=False)
class KeptActivations:
    """Mean activations of a trait's examples at every layer, with a record of their origin.

    Attributes:
        activations: `[n_layers, n_examples, d_model]`, float32, examples in the order of `Examples.items`.
        texts: the text read out of each example: its response (the model's own if the file has none), or its bare text.
        n_tokens: the number of tokens over which each mean was taken.
        examples: the digest of token ids and spans that the vectors' metadata holds as well.
        source: `source_digest` of the examples as they were in their files.
        model: the name of the model; `fingerprint` identifies its weights.
    """

    activations: Activations
    texts: Sequence[str]
    n_tokens: Sequence[int]
    examples: str
    source: str
    model: str
    fingerprint: str
    position: str

    def write(self, path: Path) -> Written:
        """Write the activations to a file."""
        return write_tensors(path, {**self.__dict__, "activations": self.activations.float().contiguous().clone()})

    @classmethod
    def read(cls, path: Path) -> KeptActivations | None:
        """The activations in a file; `None` where there is none. Raises `StorageError` for any other file."""
        if not lexists(path):
            return None
        value = read_tensors(path)
        fields = cls.__dataclass_fields__
        if not isinstance(value, dict) or set(value) != set(fields) or not cls._is_sound(value):
            raise StorageError(f"{path}: not the activations of examples: remove the file and extract the trait again")
        return cls(**value)

    @staticmethod
    def _is_sound(value: dict[str, Any]) -> bool:
        tensor, texts, counts = value["activations"], value["texts"], value["n_tokens"]
        if not is_plain(tensor) or tensor.ndim != 3 or not bool(torch.isfinite(tensor).all()):
            return False
        words = [value[name] for name in ("examples", "source", "model", "fingerprint", "position")]
        lists = isinstance(texts, list) and isinstance(counts, list) and len(texts) == len(counts) == tensor.shape[1]
        return (
            lists
            and all(isinstance(each, str) for each in (*texts, *words))
            and all(isinstance(each, int) and each > 0 for each in counts)
        )


def source_digest(examples: Examples, config: ExperimentConfig, position: str) -> str:
    """A digest of everything that decides what a model reads: the examples, the template, the position."""
    digest = hashlib.blake2b(digest_size=8)
    for item in examples.items:
        digest.update(repr((item.example, item.positive)).encode("utf-8", "surrogatepass"))
    digest.update(repr((config.use_chat_template, config.system_prompt, position)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
