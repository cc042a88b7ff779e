"""The summary of a prompt set's comparisons: for each trait the mean change, its interval, and chance.

A prompt counts once: its samples are averaged first, and so are the ids of a prompt that a set has more than once. The
change of a trait is the mean projection over the response of `b` less that of `a`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.comparison.paired import PairedDifference, interval, paired_differences
from tlcapture.errors import StorageError
from tlcapture.names import split_name
from tlcapture.storage.comparisons import compared, comparison_file
from tlcapture.storage.layout import Layout
from tlcapture.traits.verdicts import UsedVector

_MOST_TOKENS = 5  # that are listed

Values = NDArray[np.float64]


@dataclass(frozen=True)
class MeanSize:
    """A mean over prompts and its interval of 95 %, `None` for fewer than two prompts."""

    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanSize | None:
        """The mean of the values, none of them negative, ignoring NaN; `None` where all are NaN."""
        known = np.array([value for value in values if not np.isnan(value)])
        if not len(known):
            return None
        bounds = interval(known)
        return cls(float(known.mean()), None if bounds is None else (max(0.0, bounds[0]), bounds[1]))


@dataclass(frozen=True)
class DifferingToken:
    """A token at which two captures differ much: its prompt, index and text, and the divergence there."""

    prompt_id: str
    index: int
    token: str
    size: float


@dataclass(frozen=True, eq=False)
class ComparisonSummary:
    """The comparisons of one prompt set.

    Attributes:
        n_prompts, n_files: prompts, and files, of which a prompt with samples, or with several ids, has more than one.
        traits: the mean change of each trait, beside chance.
        kl: the mean divergence of the next token in the response, in nats.
        cosine, norm_ratio: of `residual_out` in the response, by layer; NaN at layers without activations.
        tokens: the tokens of responses that differ most, by divergence, or without it by cosine at the last layer.
        n_cut: files whose captures share only the beginning,
        n_apart: and of these, those that share no token of the response, whose values by token are of the prompt.
        problems: files that cannot be read, with the reason.
        vectors: the vectors that captures were projected onto.
    """

    a: str
    b: str
    n_prompts: int
    n_files: int
    traits: Mapping[str, PairedDifference]
    kl: MeanSize | None
    cosine: Values
    norm_ratio: Values
    tokens: Sequence[DifferingToken]
    by: str
    n_cut: int
    n_apart: int
    problems: Sequence[str]
    vectors: Sequence[UsedVector] = ()

    @property
    def least_alike(self) -> int | None:
        """The layer with the lowest cosine."""
        return None if np.isnan(self.cosine).all() else int(np.nanargmin(self.cosine))

    @property
    def is_alike(self) -> bool:
        """Whether residuals are equal at all compared tokens."""
        known = ~np.isnan(self.cosine)
        return bool(known.any() and (self.cosine[known] == 1).all() and (self.norm_ratio[known] == 1).all())

    def to_json(self) -> dict[str, Any]:
        """All values; null in place of NaN."""
        return {
            "a": self.a,
            "b": self.b,
            "n_prompts": self.n_prompts,
            "n_files": self.n_files,
            "n_cut": self.n_cut,
            "n_apart": self.n_apart,
            "traits": {trait: each.to_json() for trait, each in self.traits.items()},
            "kl": None if self.kl is None else {"mean": self.kl.mean, "interval": self.kl.interval},
            "cosine": _nullable(self.cosine),
            "norm_ratio": _nullable(self.norm_ratio),
            "tokens": [vars(each) for each in self.tokens],
            "tokens_by": self.by,
            "problems": list(self.problems),
        }


def read_comparisons(layout: Layout, other: str, prompt_set: str) -> tuple[dict[str, ComparisonFile], list[str]]:
    """The comparisons of a set with other captures, by prompt or sample, and why some cannot be read."""
    found: dict[str, ComparisonFile] = {}
    problems = []
    for name in compared(layout, other, prompt_set):
        try:
            found[name] = ComparisonFile.read(comparison_file(layout, other, prompt_set, name))
        except StorageError as error:
            problems.append(str(error))
    return found, problems


def summary_of(files: Mapping[str, ComparisonFile], problems: Sequence[str] = ()) -> ComparisonSummary:
    """The summary of the comparisons of one set, of which there is at least one."""
    first = next(iter(files.values()))
    groups: dict[str, list[ComparisonFile]] = {}
    for name, each in files.items():
        prompt = name if each.metadata.sample is None else split_name(name)[0]
        groups.setdefault(each.metadata.prompt_digest or prompt, []).append(each)
    traits = sorted({trait for each in files.values() for trait in each.traits})
    changes = np.array([[_mean(group, partial(_change, trait=trait)) for trait in traits] for group in groups.values()])
    random = [_random_means(list(groups.values()), trait) for trait in traits]
    found = paired_differences(changes.reshape(len(groups), len(traits)), random)
    kl = [_mean(group, lambda each: _over_response(each, each.kl)) for group in groups.values()]
    by = "kl" if any(each.kl is not None for each in files.values()) else "cosine"
    return ComparisonSummary(
        first.a,
        first.b,
        len(groups),
        len(files),
        dict(zip(traits, found, strict=True)),
        MeanSize.of(kl),
        _by_layer(list(groups.values()), "cosine"),
        _by_layer(list(groups.values()), "norm_ratio"),
        _most_different(files, by),
        by,
        sum(each.continuations is not None for each in files.values()),
        sum(len(each.tokens) == each.n_prompt_tokens for each in files.values()),
        problems,
        _vectors(files.values()),
    )


def _vectors(files: Iterable[ComparisonFile]) -> list[UsedVector]:
    used = {
        UsedVector(trait, "residual", found.method, found.layer, found.experiment): None
        for each in files
        for trait, found in each.traits.items()
        if found.experiment is not None
    }
    return list(used)


def _mean(group: Sequence[ComparisonFile], value: Callable[[ComparisonFile], float]) -> float:
    """The mean over the samples of a prompt that have the value."""
    values = [found for each in group if not np.isnan(found := value(each))]
    return float(np.mean(values)) if values else nan


def _change(file: ComparisonFile, trait: str) -> float:
    change = file.traits[trait].change if trait in file.traits else None
    return nan if change is None else change


def _random_means(groups: Sequence[Sequence[ComparisonFile]], trait: str) -> Values | None:
    """The mean changes of a trait's random directions over prompts, `[n_directions]`.

    `None` where a file with a change of the trait lacks them, or has other directions.
    """
    of_groups, directions = [], set()
    for group in groups:
        found = [each.traits[trait].random for each in group if not np.isnan(_change(each, trait))]
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            return None
        directions |= {(each.directions, len(each.changes)) for each in known}
        if known and len(directions) == 1:
            of_groups.append(np.mean([each.changes for each in known], axis=0))
    return np.mean(of_groups, axis=0) if of_groups and len(directions) == 1 else None


def _over_response(file: ComparisonFile, values: Sequence[float | None] | None) -> float:
    known = [found for index in file.response if values is not None and (found := values[index]) is not None]
    return float(np.mean(known)) if known else nan


def _by_layer(groups: Sequence[Sequence[ComparisonFile]], name: str) -> Values:
    """The mean over prompts, by layer."""
    of_groups = []
    for group in groups:
        rows = [
            [nan if value is None else value for value in row]
            for each in group
            for index in each.response
            if (row := getattr(each.residual, name)[index]) is not None
        ]
        if rows:
            of_groups.append(_nanmean(np.array(rows)))
    return _nanmean(np.array(of_groups)) if of_groups else np.full(groups[0][0].metadata.n_layers, nan)


def _nanmean(values: Values) -> Values:
    """The mean over the first axis, ignoring NaN; NaN where all values are."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), nan)


def _most_different(files: Mapping[str, ComparisonFile], by: str) -> list[DifferingToken]:
    found = []
    for name, each in files.items():
        sizes = each.kl if by == "kl" else [_turned(row) for row in each.residual.cosine]
        for index in each.response if sizes is not None else ():
            size = sizes[index] if sizes is not None else None
            if size:
                found.append(DifferingToken(name, index, each.tokens[index], size))
    return sorted(found, key=lambda each: -each.size)[:_MOST_TOKENS]


def _turned(row: Sequence[float | None] | None) -> float | None:
    """How far the residual of the last layer has turned: 1 less the cosine."""
    return None if row is None or row[-1] is None else 1 - row[-1]


def _nullable(values: Values) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
