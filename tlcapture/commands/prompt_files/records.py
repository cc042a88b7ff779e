"""The record of a capture whose activations were not saved, as projection files hold it.

With `--projections-only` no raw file records the model and the wording of a prompt. The projection files
then hold the raw file's metadata under `metadata.capture`, which a later run reads to see what is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.captures.capture_names import CaptureNames
from tlcapture.captures.provenance import is_same_computation, model_record, point_hooks
from tlcapture.errors import InputError, StorageError
from tlcapture.models.loading import Model
from tlcapture.models.sizes import Measures
from tlcapture.names import PromptId
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.projections.saved import all_saved
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import Positions, stated_positions

SAME_FOR_A_RUN = (
    "inference_model",
    "prompt_text",
    "messages",
    "system_prompt",
    "chat_template",
    "template_args",
    "layers",
    "points",
    "variant",
)


@dataclass(frozen=True)
class CaptureRecord(CaptureNames):
    """Metadata and tokens of a capture that was projected and not saved, and the tokens whose projections were kept."""

    metadata: Mapping[str, Any]
    tokens: Sequence[str] = ()
    positions: Positions | None = None

    @property
    def n_layers(self) -> int:
        """Layers of the model, whether kept or not."""
        return int(self.metadata["n_layers"])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.metadata["d_model"])

    @cached_property
    def kept(self) -> KeptPoints:
        """Which layers and residual points were projected."""
        return KeptPoints.of(self.n_layers, self.metadata["layers"], self.metadata["points"])

    @classmethod
    def of_model(cls, model: Model, kept: KeptPoints, *, attn_out: bool) -> CaptureRecord:
        """The part of the record of future captures that is known before any prompt has run."""
        measures = {"n_layers": model.n_layers, "d_model": model.d_model}
        hooks = point_hooks(model, attn_out=attn_out, points=kept.points)
        recorded = {"inference_model": model.name, "hooks": hooks, "layers": kept.layers, "points": kept.points}
        return cls({**measures, **model_record(model), **recorded})

    @classmethod
    def of_measures(cls, model: str, measures: Measures, kept: KeptPoints) -> CaptureRecord:
        """The part of the record of future captures that is known without the model's weights."""
        sizes = {"n_layers": measures.n_layers, "d_model": measures.d_model}
        return cls({**sizes, "inference_model": model, "layers": kept.layers, "points": kept.points})

    @classmethod
    def find(cls, layout: Layout, prompt_set: str, name: PromptId) -> CaptureRecord | None:
        """The capture that projections under a name were made from.

        `None` for projections that do not record it, come from different runs, or are damaged.
        """
        try:
            records = [cls.of_projection(saved.labels()) for saved in all_saved(layout, prompt_set, str(name))]
            known = [each for each in records if each is not None]
            are_of_prompt = all((each.capture_set, str(each.name)) == (prompt_set, str(name)) for each in known)
        except (StorageError, KeyError, TypeError, ValueError):  # StorageError: also of a shard
            return None
        if not known or len(known) < len(records) or not are_of_prompt:
            return None
        return known[0] if all(each._is_of_the_run_of(known[0]) for each in known) else None

    @classmethod
    def of_projection(cls, content: Mapping[str, Any]) -> CaptureRecord | None:
        """The capture that a projection was made from, by the content of its file; `None` without a record."""
        try:
            prompt, response = content["prompt"]["tokens"], content["response"]["tokens"]
            positions = stated_positions(content["metadata"], len(prompt), len(prompt + response))
            record = cls(content["metadata"]["capture"], prompt + response, positions)
            return record if record.n_layers >= 1 and record.d_model >= 1 and record.kept.layers else None
        except (StorageError, InputError, KeyError, TypeError, ValueError):
            return None

    def _is_of_the_run_of(self, other: CaptureRecord) -> bool:
        return (
            self.tokens == other.tokens
            and self.positions == other.positions
            and is_same_computation(self.metadata, other.metadata)
            and all(self.metadata.get(key) == other.metadata.get(key) for key in SAME_FOR_A_RUN)
        )

    def is_like(self, capture: Capture) -> bool:
        """Whether a capture has the same tokens, computed by the same model in the same way."""
        return list(self.tokens) == capture.tokens and is_same_computation(self.metadata, capture.metadata)
