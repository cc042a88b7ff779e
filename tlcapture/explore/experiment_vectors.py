"""The trait vectors of an experiment, for notebooks and programs.

    refusal = exp.vectors["behavioral/refusal"]
    refusal.layers, refusal.tensors[16]            # of the method that is used by default
    refusal.by("probe").tensors[16]                # [d_model], float32
    refusal.scores                                 # a data frame: method, layer, AUROC, effect size ...
    refusal.selected                               # which vector projections use, and why

Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from tlcapture.errors import InputError
from tlcapture.explore.experiment_tables import evaluation_frame
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import did_you_mean, layers_named
from tlcapture.traits.missing_vectors import no_vectors_by_method, no_vectors_of_trait
from tlcapture.traits.selection import Selection, n_layers_of_origin, select
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.views.hooks import check_component

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor


class ExperimentVectors(Mapping[str, "TraitVectors"]):
    """The vectors of an experiment, a mapping from trait to `TraitVectors`.

        exp.vectors["behavioral/refusal"]
        list(exp.vectors), list(exp.vectors("attn_out"))

    Indexing raises `InputError` for a trait without vectors, naming the traits that have some.
    """

    def __init__(self, layout: Layout, component: str = "residual"):
        self._layout = layout
        self.component = check_component(component)

    def __call__(self, component: str) -> ExperimentVectors:
        """The vectors of a component, `residual` or `attn_out`."""
        return ExperimentVectors(self._layout, component)

    def __getitem__(self, trait: str) -> TraitVectors:
        parsed = Trait.parse(trait)
        if not VectorFiles(self._layout, parsed).available(self.component):
            if parsed in self._layout.traits():
                raise no_vectors_by_method(self._layout, parsed, self.component, None)
            raise no_vectors_of_trait(self._layout, parsed, packaged="Experiment('packaged').vectors")
        return TraitVectors(self._layout, parsed, self.component)

    def __iter__(self) -> Iterator[str]:
        for trait in self._layout.traits():
            if VectorFiles(self._layout, trait).available(self.component):
                yield str(trait)

    def __contains__(self, trait: object) -> bool:
        return trait in list(self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"ExperimentVectors({self.component}: {', '.join(self) or 'none'})"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


@dataclass(frozen=True, repr=False)
class TraitVectors:
    """The vectors of one trait, component and method; by default of the selected method.

    Example:
        refusal = exp.vectors["behavioral/refusal"]
        refusal.methods, refusal.layers, refusal.selected.layer, refusal.tensors[12]
    """

    layout: Layout
    trait: Trait
    component: str = "residual"
    method: str | None = None

    @property
    def _files(self) -> VectorFiles:
        return VectorFiles(self.layout, self.trait)

    @property
    def methods(self) -> list[str]:
        """The methods that have vectors, in the order of preference."""
        return list(self._files.available(self.component))

    @property
    def selected(self) -> Selection:
        """The vector that projections use by default: layer, method, the criterion of its selection, and its score.

        Example:
            refusal.selected.layer, refusal.selected.score
        """
        n_layers = n_layers_of_origin(self._files, self.component)
        return select(self._files, self.component, n_layers, method=self.method)

    def by(self, method: str) -> TraitVectors:
        """The vectors of a method; raises `InputError` if it has none.

        Example:
            refusal.by("mean_diff").tensors[12]
        """
        if method not in self.methods:
            meant = did_you_mean(method, self.methods) or ":"
            raise InputError(f"{self.trait} has no vectors by {method!r}{meant} it has {', '.join(self.methods)}")
        return TraitVectors(self.layout, self.trait, self.component, method)

    @property
    def _method(self) -> str:
        return self.method or self.selected.method

    @property
    def layers(self) -> list[int]:
        """The layers that have a vector of this method."""
        return self._files.available(self.component)[self._method]

    @property
    def tensors(self) -> dict[int, Tensor]:
        """The vectors by layer, each `[d_model]` in float32.

        Example:
            cap.residual(12).float() @ refusal.tensors[12]
        """
        from tlcapture.traits.vectors import read_vector

        method = self._method
        return {
            layer: read_vector(self._files, self.component, method, layer).vector
            for layer in self._files.available(self.component)[method]
        }

    @property
    def scores(self) -> DataFrame:
        """The measures of `evaluate`: a row for each method and layer, or only for the rows of a given `method`.

            refusal.scores.nlargest(3, "val_auroc")

        Empty where the vectors were not evaluated.
        """

        found = evaluation_frame(self.layout)
        chosen = (found["trait"] == str(self.trait)) & (found["component"] == self.component)
        if self.method is not None:
            chosen &= found["method"] == self.method
        return found[chosen].drop(columns=["trait", "component"]).reset_index(drop=True)

    def __repr__(self) -> str:
        by_method = self._files.available(self.component)
        shown = {self.method: by_method[self.method]} if self.method else by_method
        each = ", ".join(f"{method} at {layers_named(layers)}" for method, layers in shown.items())
        selected = self.selected
        used = f"used: {selected.method} at layer {selected.layer}, by {selected.selected_by}"
        return f"TraitVectors({self.trait}, {self.component}: {each}; {used})"

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self))}</code>"
