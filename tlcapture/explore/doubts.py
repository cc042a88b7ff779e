"""Warnings about the vectors that a session projects onto, each cause once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tlcapture.errors import warn_user
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.verdicts import Doubts, UsedVector

_told: set[tuple[str, str]] = set()


def tell(doubts: Iterable[tuple[str, str]]) -> None:
    """Warn of doubts, pairs of a trait's name and a cause, in one warning per cause, each only once in a session."""
    by_cause: dict[str, list[str]] = {}
    for trait, cause in doubts:
        if (trait, cause) not in _told:
            _told.add((trait, cause))
            by_cause.setdefault(cause, []).append(trait)
    for cause, traits in by_cause.items():
        warn_user(f"{', '.join(traits)}: {cause}")


def noted(projections: Iterable[TokenScores], vectors: dict[UsedVector, None]) -> Iterator[TokenScores]:
    """The projections unchanged, each of whose vectors is added to `vectors` on the way."""
    for each in projections:
        if each.experiment is not None:
            vectors[UsedVector(each.trait, each.component, each.method, each.layer, each.experiment)] = None
        yield each


def tell_of_vectors(root: Path, vectors: Iterable[UsedVector]) -> None:
    """Warn of the doubts that `evaluate` leaves about vectors, whose experiments are in a root."""
    doubts = Doubts(root)
    found = [(each.trait, doubts.of(each)) for each in dict.fromkeys(vectors)]
    tell([(trait, doubt) for trait, doubt in found if doubt])
