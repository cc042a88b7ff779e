"""Interventions with their vectors, and their records in metadata, from which a replay restores them.

{"kind": "steer", "trait": "behavioral/refusal", "experiment": "mine", "methods": ["probe"], "layers": [16],
 "point": "residual_out", "where": "from_last_prompt_token", "coefficient": 0.2, "vector_digests": ["..."],
 "typical_norms": [43.1], "norms_from": "vectors"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from tlcapture.errors import InputError, VectorError
from tlcapture.generation.interventions.intervention import Add, Intervention, Limit, Remove
from tlcapture.generation.interventions.where import Where
from tlcapture.names import Trait
from tlcapture.shapes import Vector, Vectors
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.interventions.records import PROMPTS, VECTORS, described
from tlcapture.traits.interventions.requested import ALL, AUTO, KINDS, TraitIntervention
from tlcapture.traits.origin import check_origin
from tlcapture.traits.projections.projection import check_fits
from tlcapture.traits.selection import select
from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors
from tlcapture.traits.vectors import TraitVector, check_direction, read_vector


@dataclass(frozen=True, eq=False)
class ResolvedIntervention:
    """An intervention with its vectors, one per layer and of length 1, `[n_layers, d_model]`.

    `record` is its entry in metadata. Typical norms are missing there until they are measured, if the vectors have
    none. `doubts` are warnings.
    """

    record: Mapping[str, Any]
    units: Vectors
    doubts: tuple[str, ...] = ()

    @property
    def layers(self) -> Sequence[int]:
        """The layers at which it acts."""
        return tuple(self.record["layers"])

    @property
    def lacks_norms(self) -> bool:
        """Whether typical norms have to be measured on prompts."""
        return self.record["kind"] == "steer" and "typical_norms" not in self.record

    def with_norms(self, norms: Mapping[int, float]) -> ResolvedIntervention:
        """The intervention with typical norms of its layers, measured on prompts; unchanged if it has some."""
        if not self.lacks_norms:
            return self
        measured = {"typical_norms": [norms[layer] for layer in self.layers], "norms_from": PROMPTS}
        return replace(self, record={**self.record, **measured})

    def interventions(self) -> list[Intervention]:
        """The changes to activations, one per layer."""
        where, kind = Where.parse(self.record["where"]), self.record["kind"]
        pairs = zip(self.layers, self.units, strict=True)
        if kind == "ablate":
            return [Remove(layer=layer, direction=unit, where=where) for layer, unit in pairs]
        if kind == "cap":
            return [Limit(layer=layer, direction=unit, most=self.record["value"], where=where) for layer, unit in pairs]
        lengths = [self.record["coefficient"] * norm for norm in self.record["typical_norms"]]
        return [
            Add(layer=layer, addend=unit * length, where=where)
            for (layer, unit), length in zip(pairs, lengths, strict=True)
        ]


def resolve(
    asked: Sequence[TraitIntervention],
    source: Layout | None,
    *,
    n_layers: int,
    d_model: int,
    model: str,
    method: str | None = None,
) -> tuple[ResolvedIntervention, ...]:
    """Find the vectors of interventions.

    Args:
        source: the experiment that has the vectors; `None` if only the user's own vectors are allowed.
        n_layers, d_model, model: the measures and the name of the model to intervene on.
        method: only vectors by this method.

    Raises:
        InputError: a trait has no vectors, or the model does not have a layer.
        VectorError: a layer has no vector, or one of another width.
    """
    resolver = _Resolver(source, n_layers, d_model, model, method)
    return tuple(resolver.resolved(each) for each in asked)


def of_records(records: Sequence[Mapping[str, Any]], root: Path) -> tuple[ResolvedIntervention, ...]:
    """The interventions of a capture, given its metadata, to apply them again.

    Raises `InputError` if vectors are gone or were replaced, and for the user's own hooks.
    """
    return tuple(_of_record(record, root) for record in records)


@dataclass(frozen=True)
class _Resolver:
    """Finds the vectors of interventions on a model, in an experiment; see `resolve`."""

    source: Layout | None
    n_layers: int
    d_model: int
    model: str
    method: str | None

    def resolved(self, asked: TraitIntervention) -> ResolvedIntervention:
        record: dict[str, Any] = {"kind": asked.kind}
        if isinstance(asked.vector, Trait):
            files = self._files(asked)
            found, doubts = self._trait_vectors(asked, files)
            vectors = [each.vector for each in found]
            record |= _origin(found, files)
        else:
            layers = self._checked_layers(asked)
            found, doubts, vectors = [], [], [self._own_vector(asked)] * len(layers)
            record |= {"layers": list(layers), "vector_digests": [_digest(vector) for vector in vectors]}
        record |= {"point": "residual_out", "where": str(asked.where)}
        if asked.number_name is not None:
            record[asked.number_name] = asked.number
        norms = [_stored_norm(each, self.model) for each in found]
        if asked.kind == "steer" and norms and None not in norms:
            record |= {"typical_norms": norms, "norms_from": VECTORS}
        return ResolvedIntervention(record, torch.nn.functional.normalize(torch.stack(vectors), dim=-1), tuple(doubts))

    def _files(self, asked: TraitIntervention) -> VectorFiles:
        if self.source is None:
            raise InputError(
                f"{asked!r}: name the experiment with vectors of {asked.vector}: vectors=Experiment(NAME), or "
                "vectors=Experiment('packaged') for those that come with the package"
            )
        return VectorFiles(self.source, traits_with_vectors(self.source, [asked.vector])[0])

    def _trait_vectors(self, asked: TraitIntervention, files: VectorFiles) -> tuple[list[TraitVector], list[str]]:
        """The vector of each layer, and the doubts about them."""
        doubts: list[str | None] = []
        if asked.layers == AUTO:
            selected = select(files, "residual", self.n_layers, method=self.method)
            layers: Sequence[int] = [selected.layer]
            doubts.append(selected.warning)
        else:
            layers = self._checked_layers(asked)
        found = []
        for layer in layers:
            chosen = select(files, "residual", self.n_layers, layer=layer, method=self.method)
            vector = read_vector(files, "residual", chosen.method, chosen.layer)
            check_fits(vector, self.n_layers, self.d_model)
            check_origin(vector, {"inference_model": self.model, "n_layers": self.n_layers})
            found.append(vector)
        origins = sorted({str(vector.model or "an unknown model") for vector in found if vector.model != self.model})
        if origins:
            doubts.append(f"the vector is from {' and '.join(origins)}, and is applied to {self.model}")
        return found, [f"{asked.vector}: {doubt}" for doubt in doubts if doubt]

    def _checked_layers(self, asked: TraitIntervention) -> Sequence[int]:
        layers = tuple(range(self.n_layers)) if asked.layers == ALL else asked.layers
        assert not isinstance(layers, str)
        if layers[-1] >= self.n_layers:
            last = self.n_layers - 1
            raise InputError(f"{asked!r}: there is no layer {layers[-1]}: the model has layers 0 to {last}")
        return layers

    def _own_vector(self, asked: TraitIntervention) -> Vector:
        vector = torch.as_tensor(asked.vector).detach().float().cpu()
        if len(vector) != self.d_model:
            raise VectorError(f"{asked!r}: a vector of width {len(vector)}, but the model has width {self.d_model}")
        check_direction(vector, f"{asked!r}: the vector")
        return vector


def _origin(found: Sequence[TraitVector], files: VectorFiles) -> dict[str, Any]:
    return {
        "trait": str(files.trait),
        "experiment": files.layout.experiment,
        "methods": [each.method for each in found],
        "layers": [each.layer for each in found],
        "vector_digests": [files.digest("residual", each.method, each.layer) for each in found],
    }


def _digest(vector: Vector) -> str:
    return blake2b(vector.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _stored_norm(vector: TraitVector, model: str) -> float | None:
    """The typical norm that is stored with a vector; `None` if there is none, or it is another model's."""
    norms = vector.metadata.get("typical_norms")
    if norms is None or vector.model != model or vector.layer >= len(norms):
        return None
    return float(norms[vector.layer])


def _of_record(record: Mapping[str, Any], root: Path) -> ResolvedIntervention:
    if record.get("kind") not in KINDS:
        raise InputError(f"captured with {described(record)}, which is recorded by name only: capture it again")
    if record.get("trait") is None:
        raise InputError(f"captured with {described(record)}, which no file holds: capture it again")
    files = VectorFiles(Layout(root, record["experiment"]), Trait.parse(record["trait"]))
    vectors = []
    for layer, method, digest in zip(record["layers"], record["methods"], record["vector_digests"], strict=True):
        vector = read_vector(files, "residual", method, layer)
        if files.digest("residual", method, layer) != digest:
            raise VectorError(
                f"{files.file('residual', method, layer)}: it was replaced since the capture was made with it, so that "
                "the intervention cannot be applied again: capture it again"
            )
        vectors.append(vector.vector)
    return ResolvedIntervention(dict(record), torch.nn.functional.normalize(torch.stack(vectors), dim=-1))
