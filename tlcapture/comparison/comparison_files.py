"""The content of comparison files, checked. Loads no torch.

ComparisonFile.read(path).traits["behavioral/refusal"].difference      # [n_tokens]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from tlcapture.names import PromptId
from tlcapture.storage.files import read_json
from tlcapture.storage.validation import Count, FileContent, Layer, Number, checked

Cosine = Annotated[float, Field(ge=-1.000001, le=1.000001)]
Size = Annotated[float, Field(ge=0, le=3.5e38)]


class OtherVector(FileContent):
    """The vector that `b` was projected onto, if it is not the one of `a`."""

    layer: Layer
    method: str
    experiment: str | None = None


class RandomDifference(FileContent):
    """The changes of random directions, in the order of their draws; `directions` is equal for equal directions."""

    directions: str
    changes: list[Number] = Field(min_length=1)


class TraitDifference(FileContent):
    """The projections of `b` less those of `a`, by token; null for tokens without activations.

    `mean_a` and `mean_b` are over the tokens of the whole response of each; `None` where some lack activations.
    `random` are the changes of these means for random directions; `None` in files of earlier versions, too.
    """

    layer: Layer
    method: str
    experiment: str | None = None
    difference: list[Number | None]
    mean_a: Number | None = None
    mean_b: Number | None = None
    random: RandomDifference | None = None
    b: OtherVector | None = None

    @property
    def change(self) -> float | None:
        """The mean of `b` less that of `a`."""
        return None if self.mean_a is None or self.mean_b is None else self.mean_b - self.mean_a


class ResidualDifference(FileContent):
    """`[n_tokens][n_layers]` of `residual_out`, null where a capture holds no activations."""

    cosine: list[list[Cosine | None] | None]
    norm_ratio: list[list[Size | None] | None]


class Continuations(FileContent):
    """The tokens of each side after those that both have."""

    a: list[str]
    b: list[str]


class ComparisonMetadata(FileContent):
    """What was compared, and how; further fields record more.

    `prompt_digest` is equal for prompts of the same tokens. `models` are those of `a` and `b`, as in the metadata of
    their captures.
    """

    prompt_set: str
    prompt_id: PromptId
    n_layers: Annotated[int, Field(ge=1, le=10_000)]
    prompt_digest: str | None = None
    sample: int | None = None
    vectors: str | None = None
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)


class ComparisonFile(FileContent):
    """The comparison of one prompt."""

    a: str
    b: str
    tokens: list[str]
    n_prompt_tokens: Count
    traits: dict[str, TraitDifference]
    residual: ResidualDifference
    metadata: ComparisonMetadata
    kl: list[Size | None] | None = None
    continuations: Continuations | None = None

    @classmethod
    def read(cls, path: Path) -> ComparisonFile:
        """The file at `path`; raises `StorageError` for any other file."""
        return checked(cls, read_json(path), path, "comparison")

    @property
    def response(self) -> range:
        """The compared tokens of the response; if there are none, of the prompt except the first."""
        n_tokens, n_prompt = len(self.tokens), self.n_prompt_tokens
        return range(n_prompt, n_tokens) if n_tokens > n_prompt else range(1, n_tokens)

    @model_validator(mode="after")
    def _is_aligned(self) -> ComparisonFile:
        if self.n_prompt_tokens > len(self.tokens):
            raise ValueError(f"n_prompt_tokens is {self.n_prompt_tokens}, but tokens has {len(self.tokens)}")
        for name, values in self._columns():
            if len(values) != len(self.tokens):
                raise ValueError(f"{name} has {len(values)} tokens, but tokens has {len(self.tokens)}")
        for name in ("cosine", "norm_ratio"):
            for row in getattr(self.residual, name):
                if row is not None and len(row) != self.metadata.n_layers:
                    raise ValueError(f"residual.{name} has {len(row)} layers, but there are {self.metadata.n_layers}")
        return self

    def _columns(self) -> Iterator[tuple[str, list[Any]]]:
        yield from ((f"traits.{trait}", each.difference) for trait, each in self.traits.items())
        yield "residual.cosine", self.residual.cosine
        yield "residual.norm_ratio", self.residual.norm_ratio
        if self.kl is not None:
            yield "kl", self.kl
