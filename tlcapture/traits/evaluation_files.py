"""The content of `extraction_evaluation.json`, checked: how well each vector separates held-out examples."""

from __future__ import annotations

from collections.abc import Iterable
from os.path import lexists
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.files import read_json
from tlcapture.storage.validation import FileContent, Layer, Number, Share, checked


class EvaluationRow(FileContent):
    """The evaluation of one vector. A row whose effect size is null (NaN in JSON) is ignored in selections."""

    trait: str
    method: str
    layer: Layer
    component: str = "residual"
    val_effect_size: Number | None
    val_auroc: Share | None = None
    val_accuracy: Share | None = None
    val_effect_size_interval: list[Number] | None = Field(default=None, min_length=2, max_length=2)
    random_auroc: Share | None = None
    random_auroc_p95: Share | None = None
    vector_digest: str | None = None

    @field_validator("trait")
    @classmethod
    def _is_a_trait(cls, value: str) -> str:
        try:
            Trait.parse(value)
        except InputError as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Trait, component, method and layer, which identify a vector."""
        return (self.trait, self.component, self.method, self.layer)

    def as_written(self) -> dict[str, Any]:
        """The row with only those fields that the file has."""
        return self.model_dump(exclude_unset=True)


class _EvaluationFile(FileContent):
    all_results: list[EvaluationRow]


def read_evaluation(path: Path) -> list[EvaluationRow]:
    """All rows; none for a missing file. Raises `StorageError` for a file that is not an evaluation."""
    return checked(_EvaluationFile, read_json(path), path, "evaluation").all_results if lexists(path) else []


def best_by_trait(rows: Iterable[EvaluationRow]) -> dict[str, EvaluationRow]:
    """Each trait's row with the largest effect size, among residual vectors, or all vectors if none is residual."""
    measured = [row for row in rows if row.val_effect_size is not None]
    best: dict[str, EvaluationRow] = {}
    for row in [row for row in measured if row.component == "residual"] or measured:
        if row.trait not in best or _size(row) > _size(best[row.trait]):
            best[row.trait] = row
    return best


def _size(row: EvaluationRow) -> float:
    return float("-inf") if row.val_effect_size is None else row.val_effect_size
