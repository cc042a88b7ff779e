"""The summary of a prompt set's comparisons: for each trait the mean change, its interval, and chance.

A prompt counts once: its samples are averaged first, and so are the ids of a prompt that a set has more than once. The
change of a trait is the mean projection over the response of `b` less that of `a`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tlcapture.comparison.comparison_files import ComparisonFile
from tlcapture.comparison.outdated import is_outdated
from tlcapture.comparison.paired import PairedDifference, interval, paired_differences
from tlcapture.errors import StorageError
from tlcapture.names import split_name
from tlcapture.storage.experiments.comparisons import compared, comparison_file
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import counted, listed
from tlcapture.traits.verdicts import UsedVector

_MOST_TOKENS = 5  # that are listed

Values = NDArray[np.float64]
OnFile = Callable[[str, ComparisonFile], None]


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
        names: the names of the comparisons.
        outdated: the names of those that are left out, since a capture of theirs was made again.
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
    names: Sequence[str] = ()
    outdated: Sequence[str] = ()

    @property
    def left_out(self) -> str | None:
        """A line about comparisons that are outdated; `None` where all are current."""
        if not self.outdated:
            return None
        number = counted(len(self.outdated), "comparison")
        return f"left out: {number} of captures that were made again since ({listed(self.outdated)})"

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
            "n_outdated": len(self.outdated),
            "traits": {trait: each.to_json() for trait, each in self.traits.items()},
            "kl": None if self.kl is None else {"mean": self.kl.mean, "interval": self.kl.interval},
            "cosine": _nullable(self.cosine),
            "norm_ratio": _nullable(self.norm_ratio),
            "tokens": [vars(each) for each in self.tokens],
            "tokens_by": self.by,
            "problems": list(self.problems),
        }


class Files(Protocol):
    """Comparisons by prompt or sample, which may be read one at a time."""

    def items(self) -> Iterable[tuple[str, ComparisonFile]]:
        """All of them, with their names."""

    def __getitem__(self, name: str) -> ComparisonFile:
        """One of them."""


@dataclass
class SavedComparisons:
    """The comparisons of a set with other captures: each is read when its turn comes, and not kept.

    Attributes:
        before_each: called before a file is read.
        problems: of the files that were read so far, why some cannot be.
        outdated: and, by name, `b` of those that are left out since a capture of theirs was made again.
    """

    layout: Layout
    other: str
    prompt_set: str
    before_each: Callable[[], None] = lambda: None
    problems: list[str] = field(default_factory=list)
    outdated: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ComparisonFile:
        return ComparisonFile.read(self._path(name))

    def _path(self, name: str) -> Path:
        return comparison_file(self.layout, self.other, self.prompt_set, name)

    def items(self) -> Iterator[tuple[str, ComparisonFile]]:
        """The comparisons that can be read and are current, in the order of their names."""
        for name in compared(self.layout, self.other, self.prompt_set):
            self.before_each()
            try:
                found = self[name]
                is_current = not is_outdated(self.layout, self.prompt_set, self._path(name), found)
            except StorageError as error:
                self.problems.append(str(error))
                continue
            if is_current:
                yield name, found
            else:
                self.outdated[name] = found.b

    def summary(self, on_file: OnFile = lambda name, file: None) -> ComparisonSummary:
        """The summary of them all; `on_file` is called with each name and file.

        Where none can be read and is current, `n_files` is 0.
        """
        found = summary_of(self, on_file)
        return replace(found, problems=self.problems, outdated=list(self.outdated))


def summary_of(files: Files, on_file: OnFile = lambda name, file: None) -> ComparisonSummary:
    """The summary of the comparisons of one set; `on_file` is called with each name and file.

    What is kept of a file does not grow with its tokens. A set in which equal prompts are apart is read twice.
    """
    first: ComparisonFile | None = None
    groups: dict[str, _Prompt] = {}
    random, vectors = _RandomMeans(), dict[UsedVector, None]()
    most: dict[str, list[DifferingToken]] = {"kl": [], "cosine": []}
    n_cut = n_apart = 0
    has_kl = False
    for name, each in files.items():
        on_file(name, each)
        first = first or each
        prompt = name if each.metadata.sample is None else split_name(name)[0]
        key = each.metadata.prompt_digest or prompt
        groups.setdefault(key, _Prompt(each.metadata.n_layers)).add(name, each)
        random.add(key, each)
        vectors |= dict.fromkeys(_vectors(each))
        for by, found in most.items():
            found[:] = sorted([*found, *_differing(name, each, by)], key=lambda token: -token.size)[:_MOST_TOKENS]
        has_kl |= each.kl is not None
        n_cut += each.continuations is not None
        n_apart += len(each.tokens) == each.n_prompt_tokens
    if random.is_apart:
        random = _RandomMeans()
        for key, group in groups.items():
            for name in group.names:
                random.add(key, files[name])
    by, prompts = "kl" if has_kl else "cosine", list(groups.values())
    traits = sorted({trait for each in prompts for trait in each.changes})
    changes = np.array([[_mean(each.changes.get(trait, ())) for trait in traits] for each in prompts])
    differences = paired_differences(changes.reshape(len(prompts), len(traits)), random.means(traits))
    cosine, norm_ratio = _by_layer(prompts)
    return ComparisonSummary(
        "" if first is None else first.a,
        "" if first is None else first.b,
        len(prompts),
        sum(len(each.names) for each in prompts),
        dict(zip(traits, differences, strict=True)),
        MeanSize.of([_mean(each.kl) for each in prompts]),
        cosine,
        norm_ratio,
        most[by],
        by,
        n_cut,
        n_apart,
        (),
        list(vectors),
        [name for each in prompts for name in each.names],
    )


class _Prompt:
    """The comparisons of a prompt, of which there are several if it has samples or several ids.

    Attributes:
        names: of the comparisons.
        changes: of each trait, in the comparisons that have one.
        kl: the mean divergence over the response, likewise.
        sums, counts: of the cosine and the norm ratio over tokens of responses, `[2, n_layers]`.
    """

    def __init__(self, n_layers: int):
        self.names: list[str] = []
        self.changes: dict[str, list[float]] = {}
        self.kl: list[float] = []
        self.sums = np.zeros((2, n_layers))
        self.counts = np.zeros((2, n_layers), dtype=np.int64)

    def add(self, name: str, file: ComparisonFile) -> None:
        """Take in another comparison of the prompt."""
        self.names.append(name)
        for trait, each in file.traits.items():
            self.changes.setdefault(trait, []).extend([] if each.change is None else [each.change])
        known = [found for index in file.response if file.kl is not None and (found := file.kl[index]) is not None]
        self.kl += [float(np.mean(known))] if known else []
        for number, rows in enumerate((file.residual.cosine, file.residual.norm_ratio)):
            if kept := [row for index in file.response if (row := rows[index]) is not None]:
                values = np.array(kept, dtype=np.float64)  # NaN in place of null
                is_known = ~np.isnan(values)
                for row in np.where(is_known, values, 0.0):
                    self.sums[number] += row
                self.counts[number] += is_known.sum(axis=0)


class _RandomMeans:
    """The mean changes of random directions over prompts, whose comparisons come one after another.

    `is_apart` says whether comparisons of one prompt did not: then the means are wrong.
    """

    def __init__(self) -> None:
        self.is_apart = False
        self._seen: set[str] = set()
        self._prompt = ""
        self._of_prompt: dict[str, tuple[Values, int]] = {}
        self._of_traits: dict[str, tuple[Values, int]] = {}
        self._directions: dict[str, set[tuple[str, int] | None]] = {}

    def add(self, prompt: str, file: ComparisonFile) -> None:
        """Take in a comparison."""
        if prompt != self._prompt:
            self._end_prompt()
            self.is_apart |= prompt in self._seen
            self._seen.add(prompt)
            self._prompt = prompt
        for trait, each in file.traits.items():
            if each.change is None:
                continue
            found = each.random
            directions = self._directions.setdefault(trait, set())
            directions.add(None if found is None else (found.directions, len(found.changes)))
            if found is not None and len(directions) == 1:
                _add(self._of_prompt, trait, np.array(found.changes))

    def means(self, traits: Sequence[str]) -> list[Values | None]:
        """The mean of each trait's random directions over prompts, `[n_directions]`.

        `None` where a file with a change of the trait lacks them, or has other directions.
        """
        self._end_prompt()
        return [
            None
            if len(directions := self._directions.get(trait, {None})) > 1 or None in directions
            else np.divide(*self._of_traits[trait])
            for trait in traits
        ]

    def _end_prompt(self) -> None:
        for trait, mean in self._of_prompt.items():
            _add(self._of_traits, trait, np.divide(*mean))
        self._of_prompt = {}


def _add(sums: dict[str, tuple[Values, int]], trait: str, values: Values) -> None:
    total, n = sums.get(trait, (None, 0))
    sums[trait] = (values if total is None else total + values, n + 1)


def _vectors(file: ComparisonFile) -> Iterator[UsedVector]:
    for trait, found in file.traits.items():
        if found.experiment is not None:
            yield UsedVector(trait, "residual", found.method, found.layer, found.experiment)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


def _by_layer(prompts: Sequence[_Prompt]) -> Values:
    """The means of cosines and norm ratios over prompts, `[2, n_layers]`; NaN at layers without activations."""
    if not prompts:
        return np.full((2, 0), nan)
    means = np.array([np.where(each.counts, each.sums / np.maximum(each.counts, 1), nan) for each in prompts])
    known = ~np.isnan(means)
    count = known.sum(axis=0)
    return np.where(count, np.where(known, means, 0.0).sum(axis=0) / np.maximum(count, 1), nan)


def _differing(name: str, file: ComparisonFile, by: str) -> Iterator[DifferingToken]:
    """The tokens of the response at which captures differ, by `kl` or `cosine`."""
    sizes = file.kl if by == "kl" else [_turned(row) for row in file.residual.cosine]
    for index in file.response if sizes is not None else ():
        size = sizes[index] if sizes is not None else None
        if size:
            yield DifferingToken(name, index, file.tokens[index], size)


def _turned(row: Sequence[float | None] | None) -> float | None:
    """How far the residual of the last layer has turned: 1 less the cosine."""
    return None if row is None or row[-1] is None else 1 - row[-1]


def _nullable(values: Values) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
