"""One saved projection as arrays: tokens and their scores, for figures, frames and pictures. Loads no torch.

scores = TokenScores.read(path)        # a projection file
scores.trajectory                      # [n_tokens], at the vector's own layer
scores.at(5)                           # [n_tokens], residual_out of layer 5 on the same vector
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError, StorageError
from tlcapture.names import PromptId, capture_name, is_safe_name, of_variant
from tlcapture.prompts.spans import TokenSpan
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.projection_places import place_of_projection
from tlcapture.text import layers_named
from tlcapture.traits.calibration import Calibration
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.statistics.rises import DEFINITIONS, peak_of
from tlcapture.views.kept_tokens import spread_rows

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Tokens of a prompt and its response as one sequence, and their projection onto a trait's vector.

        (scores,) = cap.projected("behavioral/refusal")
        scores.trajectory, scores.calibrated, scores.peak, scores.at(12), scores.by_layer("after_attn")
        scores.name, scores.title, scores.kept_tokens, scores.n_layers

    Attributes:
        sample: the number of the response, from 1, among several to the same prompt; `None` if it is the only one.
        layer: the vector's own layer, at which the trajectory is taken.
        scores: `[n_tokens, n_layers, n_sublayers]`, in units of the activations; the sublayers are named by
            `sublayers`, the last of them being `residual_out` (or `attn_out`). NaN at layers and tokens that the
            capture did not keep.
        layers: the layers that the capture kept.
        commitment_point, persistence: the dynamics; token indices count over the whole sequence.
        calibration: the positions of the vector's examples on the scale of the scores; `None` if not recorded.
        spans: which tokens are which turn, thinking or answer; none in files that were written before there were spans.
        definitions: the version of the dynamics' definitions; 1 for files made before they had a number.
        positions: the tokens that have scores; `None` means all.
        experiment: the vector's experiment, if known.
    """

    prompt_set: str
    prompt_id: PromptId
    trait: str
    component: str
    method: str
    layer: int
    tokens: Sequence[str] = field(repr=False)
    n_prompt_tokens: int
    scores: Scores = field(repr=False)
    sublayers: Sequence[str]
    layers: Sequence[int]
    commitment_point: int | None
    persistence: int | None
    calibration: Calibration | None = None
    definitions: int = DEFINITIONS
    spans: Sequence[TokenSpan] = ()
    positions: Sequence[int] | None = None
    sample: int | None = None
    experiment: str | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 3 or len(self.scores) != len(self.tokens):
            raise StorageError(f"scores of shape {list(self.scores.shape)} for {len(self.tokens)} tokens")
        if self.scores.shape[2] != len(self.sublayers) or not self.sublayers:
            raise StorageError(f"{self.scores.shape[2]} scores per layer, but {len(self.sublayers)} sublayers")
        if not 0 <= self.layer < self.n_layers:
            raise StorageError(f"a vector of layer {self.layer}, but scores of {self.n_layers} layers")
        if self.layer not in self.layers or not set(self.layers) <= set(range(self.n_layers)):
            raise StorageError(f"a vector of layer {self.layer}, but scores of {layers_named(self.layers)}")
        if not np.isfinite(self.scores[np.ix_(self.kept_tokens, list(self.layers))]).all():
            raise StorageError("a score is NaN or inf")
        if self.commitment_point is not None and not 0 <= self.commitment_point < len(self.tokens):
            raise StorageError(f"commitment point {self.commitment_point} of {len(self.tokens)} tokens")

    @property
    def kept_tokens(self) -> Sequence[int]:
        """Indices of the tokens that have scores."""
        return range(len(self.tokens)) if self.positions is None else self.positions

    @property
    def n_layers(self) -> int:
        """Layers of the model, whether kept or not."""
        return int(self.scores.shape[1])

    @property
    def trajectory(self) -> Scores:
        """`s[t]`: the last sublayer's projection at the vector's own layer."""
        return self.at(self.layer)

    @property
    def peak(self) -> int | None:
        """Index of the response token where the smoothed trajectory is largest, from which persistence counts.

        `None` if the rise is within chance, for dynamics by earlier definitions, and if a token of the response
        has no score.
        """
        if self.persistence is None or self.definitions < DEFINITIONS:
            return None
        if np.isnan(self.trajectory[self.n_prompt_tokens :]).any():
            return None
        return peak_of(self.trajectory, self.n_prompt_tokens)

    @property
    def calibrated(self) -> Scores | None:
        """The trajectory on the scale on which the negative examples' mean is 0 and the positive ones' is 1."""
        return None if self.calibration is None else self.calibration.calibrated(self.trajectory)

    @property
    def name(self) -> PromptId:
        """The capture's name within its set: `7`, or `7.s1` for a sample."""
        return capture_name(self.prompt_id, self.sample)

    @property
    def title(self) -> str:
        """Trait, component, method and layer, as a title for figures."""
        return f"{self.trait}, {self.component}, {self.method} of layer {self.layer}"

    def at(self, layer: int, sublayer: str | None = None) -> Scores:
        """The scores `[n_tokens]` at a layer, of a sublayer or of the last one.

        Raises `InputError` for a layer or a sublayer that the projection does not have.
        """
        if layer not in self.layers:
            raise InputError(f"no layer {layer}: the projection has {layers_named(self.layers)}")
        return self.by_layer(sublayer)[:, layer]

    def by_layer(self, sublayer: str | None = None) -> Scores:
        """The scores `[n_tokens, n_layers]` of a sublayer or of the last one, NaN at layers not kept."""
        if sublayer is not None and sublayer not in self.sublayers:
            raise InputError(f"no point {sublayer!r}: the projection has {', '.join(self.sublayers)}")
        return self.scores[:, :, -1 if sublayer is None else list(self.sublayers).index(sublayer)]

    @classmethod
    def read(cls, path: str | Path) -> TokenScores:
        """Read a projection file; raises `StorageError` for any other file.

            path = exp.layout.projection(Trait.parse("behavioral/refusal"), "residual", "single_trait", 1)
            TokenScores.read(path).trajectory

        Labels that the file lacks are taken from its path.
        """
        return cls.of(ProjectionFile.read(Path(path)), Path(path), Path(path))

    @classmethod
    def of(cls, content: ProjectionFile, path: Path, json_path: Path) -> TokenScores:
        """The scores of a projection in the file `path`, whose JSON file would be `json_path`; raises like `read`."""
        metadata, dynamics = content.metadata, content.dynamics
        source, place = metadata.vector_source, place_of_projection(json_path)
        labels: dict[str, Any] = {
            "prompt_set": (metadata.prompt_set and of_variant(metadata.prompt_set, metadata.variant))
            or (place and place.prompt_set),
            "prompt_id": place.prompt_id if metadata.prompt_id is None and place else metadata.prompt_id,
            "trait": (place and str(place.trait)) or source.trait,
            "component": source.component or (place and place.component),
        }
        missing = [name for name, value in {"dynamics": dynamics, **labels}.items() if value is None]
        if missing or dynamics is None:
            raise StorageError(
                f"{path}: not a complete projection file: it lacks {', '.join(missing)}"
                + (f": run '{dynamics_command(json_path)}'" if missing == ["dynamics"] else "")
            )
        sublayers = content.sublayers(labels["component"])
        not_kept = [np.nan] * len(sublayers)  # the scores of a layer
        rows = [[not_kept if at is None else at for at in token] for token in content.scores]
        held = content.positions
        return cls(
            **labels,
            method=source.method or "unknown",
            layer=source.layer,
            tokens=content.tokens,
            n_prompt_tokens=len(content.prompt.tokens),
            scores=np.array(spread_rows(rows, held, [not_kept] * content.n_layers), np.float64),
            sublayers=sublayers,
            layers=content.layers,
            commitment_point=dynamics.commitment_point,
            persistence=dynamics.persistence,
            calibration=content.calibration,
            definitions=metadata.definitions,
            spans=tuple(content.spans),
            positions=held.stated,
            sample=metadata.sample,
            experiment=source.experiment,
        )


def dynamics_command(path: Path) -> str:
    """The command that recomputes the dynamics of a projection whose JSON file is or would be at `path`."""
    place = place_of_projection(path)
    if place is None or place.folder.parent.name != "experiments" or not is_safe_name(place.folder.name):
        return "tlcapture project --dynamics-only"
    component = [] if place.component == "residual" else ["--component", place.component]
    layout = Layout(place.folder.parents[1], place.folder.name)
    return command_line(layout, "project", "--prompt-set", place.prompt_set, *component, "--dynamics-only")
