"""The doubts of `evaluate` about a trait's vectors, to be repeated where they are used. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tlcapture.errors import StorageError, TlcaptureError
from tlcapture.names import Trait
from tlcapture.traits.evaluation_files import Evaluation
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.selection import is_current
from tlcapture.traits.vector_files import IMPORTED, VectorFiles
from tlcapture.traits.vector_sources.packaged import vectors_layout

_BY = ", by 'tlcapture evaluate'"
_UNREAD = "whether it shows anything is unknown: its evaluation, extraction_evaluation.json, cannot be read"


@dataclass(frozen=True)
class UsedVector:
    """The identity of a vector that something was projected onto."""

    trait: str
    component: str
    method: str
    layer: int
    experiment: str


def used_vector(content: ProjectionFile, trait: str, component: str) -> UsedVector | None:
    """The vector of a projection; `None` if its file does not name its experiment."""
    source = content.metadata.vector_source
    if source.method is None or source.experiment is None:
        return None
    return UsedVector(trait, component, source.method, source.layer, source.experiment)


@dataclass(frozen=True)
class Doubts:
    """The doubts about the vectors of a root's experiments, whose evaluations are read again only if they change."""

    root: Path

    def of(self, vector: UsedVector) -> str | None:
        """Why a vector may show nothing, by the verdict of its evaluation; `None` if it shows something.

        Also `None` if this very vector was not evaluated, and for an imported one, since the verdict is on extracted
        vectors. An evaluation that cannot be read is a doubt.
        """
        if vector.method == IMPORTED:
            return None
        with suppress(TlcaptureError, OSError):
            layout = vectors_layout(self.root, vector.experiment)
            if not layout.evaluation.is_file():
                return None
            try:
                evaluation = Evaluation.read(layout.evaluation)
            except StorageError:
                return _UNREAD
            judged = evaluation.by_trait.get(vector.trait)
            if judged is None or judged.component != vector.component or not judged.doubt:
                return None
            files = VectorFiles(layout, Trait.parse(vector.trait))
            key = (vector.trait, vector.component, vector.method, vector.layer)
            rows = [row for row in evaluation.rows_of.get(vector.trait, ()) if row.key == key]
            if rows and all(is_current(files, row, vector.component) for row in rows):
                return judged.doubt + _BY
        return None

    def lines(self, vectors: Iterable[UsedVector]) -> list[str]:
        """The doubts as text, each with its traits."""
        return [f"{', '.join(traits)}: {cause}" for cause, traits in self.by_cause(vectors).items()]

    def by_cause(self, vectors: Iterable[UsedVector]) -> dict[str, list[str]]:
        """The traits of each doubt."""
        found: dict[str, list[str]] = {}
        for vector in vectors:
            cause = self.of(vector)
            if cause is not None and vector.trait not in found.setdefault(cause, []):
                found[cause].append(vector.trait)
        return found


def layers_of(vectors: Iterable[UsedVector]) -> dict[str, int]:
    """The layer of each trait's vector, for traits with vectors of one layer alone."""
    found: dict[str, set[int]] = {}
    for vector in vectors:
        found.setdefault(vector.trait, set()).add(vector.layer)
    return {trait: layers.pop() for trait, layers in found.items() if len(layers) == 1}
