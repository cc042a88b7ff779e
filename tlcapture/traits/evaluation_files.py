"""The content of `extraction_evaluation.json`, checked: how well each vector separates held-out examples."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, lru_cache
from os.path import lexists
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.files import FileState, read_json
from tlcapture.storage.validation import FileContent, Layer, Number, Share, checked
from tlcapture.traits.statistics.critical_values import LEVEL


class EvaluationRow(FileContent):
    """The evaluation of one vector. A row whose effect size is null (NaN in JSON) is ignored in selections."""

    trait: str
    method: str
    layer: Layer
    component: str = "residual"
    val_effect_size: Number | None
    val_auroc: Share | None = None
    val_accuracy: Share | None = None
    val_effect_size_interval: list[Number | None] | None = Field(default=None, min_length=2, max_length=2)
    cv_auroc: Share | None = None
    cv_effect_size: Number | None = None
    null_auroc_p95: Share | None = None
    layer0_auroc: Share | None = None
    bag_of_words_auroc: Share | None = None
    length_auroc: Share | None = None
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
    def effect_size(self) -> float | None:
        """The effect size by which vectors are selected: cross-validated over all pairs, if that was measured."""
        return self.val_effect_size if self.cv_effect_size is None else self.cv_effect_size

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Trait, component, method and layer, which identify a vector."""
        return (self.trait, self.component, self.method, self.layer)

    def as_written(self) -> dict[str, Any]:
        """The row with only the fields that the file has."""
        return self.model_dump(exclude_unset=True)


class TraitEvaluation(FileContent):
    """The selected vector of a trait, and the score of such a choice on pairs that took no part in it."""

    layer: Layer
    method: str
    component: str = "residual"
    nested_auroc: Share | None = None
    nested_sd: Number | None = None
    nested_effect_size: Number | None = None
    chosen_layers: dict[str, int] = Field(default_factory=dict)
    baselines: dict[str, Share | None] = Field(default_factory=dict)
    gain: Number | None = None
    gain_interval: list[Number | None] | None = Field(default=None, min_length=2, max_length=2)
    p: Share | None = None
    verdict: str | None = None

    @property
    def doubt(self) -> str | None:
        """The verdict's doubt, without its numbers; `None` if the vector adds something."""
        if self.verdict is None or self.p is None or self.gain_interval is None:
            return None
        if self.p > LEVEL:
            return "no better than vectors of shuffled labels"
        low, known = self.gain_interval[0], {name: rate for name, rate in self.baselines.items() if rate is not None}
        if known and (low is None or low <= 0):
            return f"adds nothing over {max(known, key=lambda name: known[name])} that its examples can show"
        return None

    @property
    def summary(self) -> dict[str, Any]:
        """The file's data on the trait as a whole, without the fields of the selected vector."""
        names = self.model_fields_set & type(self).model_fields.keys() - {"layer", "method", "component"}
        return {name: getattr(self, name) for name in type(self).model_fields if name in names}


class Evaluation(FileContent):
    """The content of the file.

    `cross_trait` is the AUROC of each trait's vector on the examples of each trait, `cross_trait_chance` how far from
    0.5 the farthest of them on another trait's examples is by chance, `carry_over` the scores on other datasets by
    their name and trait.
    """

    all_results: list[EvaluationRow]
    best_vectors: Any = None  # other tools write other things here
    cross_trait: Any = None
    cross_trait_chance: Any = None
    carry_over: Any = None

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read a file, once for as long as it stays the same; a missing file gives an empty evaluation.

        Raises `StorageError` for any other file.
        """
        if not lexists(path):
            return cls(all_results=[])
        with suppress(OSError):
            return _read(path, FileState.of(path.stat()))
        return checked(cls, read_json(path), path, "evaluation")

    @cached_property
    def rows_of(self) -> dict[str, list[EvaluationRow]]:
        """The rows by trait."""
        found: dict[str, list[EvaluationRow]] = {}
        for row in self.all_results:
            found.setdefault(row.trait, []).append(row)
        return found

    @cached_property
    def by_trait(self) -> dict[str, TraitEvaluation]:
        """The valid entries of `best_vectors`; other tools may write others."""
        return _valid(TraitEvaluation, self.best_vectors)

    @cached_property
    def cross_traits(self) -> dict[str, dict[str, float]]:
        """The valid rows of `cross_trait`."""
        return {trait: row.root for trait, row in _valid(_CrossTraitRow, self.cross_trait).items()}

    @property
    def cross_traits_by_chance(self) -> tuple[float, float] | None:
        """The AUROCs between which those on another trait's examples lie by chance; `None` where that is not known."""
        with suppress(ValidationError):
            farthest = _Farthest.model_validate(self.cross_trait_chance).root
            return 0.5 - farthest, 0.5 + farthest
        return None

    @property
    def carry_overs(self) -> dict[str, dict[str, Any]]:
        """The content of `carry_over` by dataset and trait, in a new dict."""
        found = self.carry_over if isinstance(self.carry_over, dict) else {}
        return {name: dict(by_trait) for name, by_trait in found.items() if isinstance(by_trait, dict)}

    def carry_over_to(self, dataset: str) -> dict[str, list[CarryOverRow]]:
        """The valid scores on a dataset, by trait."""
        return {trait: rows.root for trait, rows in _valid(_CarryOverRows, self.carry_overs.get(dataset)).items()}


@lru_cache(maxsize=4)
def _read(path: Path, _state: FileState) -> Evaluation:
    return checked(Evaluation, read_json(path), path, "evaluation")


class CarryOverRow(FileContent):
    """The score of one vector on another dataset of its trait; `p` is the share of shuffles that score as well.

    `layer0_auroc` is the AUROC of layer 0's vector, `bag_of_words_auroc` that of words learned from the trait's own
    examples.
    """

    method: str
    layer: Layer
    component: str = "residual"
    auroc: Share
    effect_size: Number | None = None
    effect_size_interval: list[Number | None] | None = Field(default=None, min_length=2, max_length=2)
    null_auroc_p95: Share | None = None
    p: Share | None = None
    layer0_auroc: Share | None = None
    bag_of_words_auroc: Share | None = None
    n_positive: int | None = None
    n_negative: int | None = None

    @property
    def is_reversed(self) -> bool:
        """Whether the vector separates the sides the wrong way round, more than 95 % of shuffles do."""
        return self.null_auroc_p95 is not None and self.auroc < 1 - self.null_auroc_p95


class _CarryOverRows(RootModel[list[CarryOverRow]]):
    pass


class _Farthest(RootModel[Annotated[float, Field(ge=0, le=0.5)]]):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _CrossTraitRow(RootModel[dict[str, Share]]):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Valid = TypeVar("Valid", bound=BaseModel)


def _valid(kind: type[Valid], values: Any) -> dict[str, Valid]:
    found = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        with suppress(ValidationError):
            found[str(name)] = kind.model_validate(value)
    return found


def read_evaluation(path: Path) -> list[EvaluationRow]:
    """All rows; none for a missing file. Raises `StorageError` for a file that is not an evaluation."""
    return Evaluation.read(path).all_results


def best_by_trait(rows: Iterable[EvaluationRow]) -> dict[str, EvaluationRow]:
    """Each trait's row with the largest effect size, among residual vectors, or all vectors if none is residual."""
    measured = [(row.effect_size, row) for row in rows if row.effect_size is not None]
    best: dict[str, tuple[float, EvaluationRow]] = {}
    for size, row in [each for each in measured if each[1].component == "residual"] or measured:
        if row.trait not in best or size > best[row.trait][0]:
            best[row.trait] = size, row
    return {trait: row for trait, (_, row) in best.items()}
