"""Prompts of which only projections are kept: what their files say of the capture that was projected.

With `--projections-only` there is no raw file that could tell of which model and wording a prompt's
projections are. The projection files then hold the metadata that it would have had, under
`metadata.capture`, and stand for it where a run asks what is there already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.captures.provenance import model_record, point_hooks
from tlcapture.errors import InputError, StorageError
from tlcapture.models.loading import Model
from tlcapture.storage.files import read_json
from tlcapture.storage.layout import Layout
from tlcapture.views.kept_points import KeptPoints

_ALIKE = ("model_fingerprint", "engine", "dtype")
_OF_A_RUN = (*_ALIKE, "inference_model", "prompt_text", "system_prompt", "chat_template", "layers", "points")


@dataclass(frozen=True)
class ProjectedCapture:
    """A capture that was projected and not kept: its metadata and its tokens."""

    metadata: Mapping[str, Any]
    tokens: Sequence[str] = ()

    @property
    def prompt_set(self) -> str:
        return str(self.metadata["prompt_set"])

    @property
    def prompt_id(self) -> str:
        return str(self.metadata["prompt_id"])

    @property
    def n_layers(self) -> int:
        return int(self.metadata["n_layers"])

    @property
    def d_model(self) -> int:
        return int(self.metadata["d_model"])

    @cached_property
    def kept(self) -> KeptPoints:
        return KeptPoints.of(self.n_layers, self.metadata["layers"], self.metadata["points"])

    @classmethod
    def of_model(cls, model: Model, kept: KeptPoints, *, attn_out: bool) -> ProjectedCapture:
        """What will be projected, as far as it can be told before any prompt has run."""
        measures = {"n_layers": model.n_layers, "d_model": model.d_model}
        hooks = point_hooks(model, attn_out=attn_out, points=kept.points)
        said = {"inference_model": model.name, "hooks": hooks, "layers": kept.layers, "points": kept.points}
        return cls({**measures, **model_record(model), **said})

    @classmethod
    def find(cls, layout: Layout, prompt_set: str, prompt_id: str) -> ProjectedCapture | None:
        """What the projections of a prompt were made from; `None` where there are none that say so, or where they
        are of different runs or damaged."""
        found: list[ProjectedCapture] = []
        for path in layout.all_projections(prompt_set, prompt_id):
            try:
                content = read_json(path)
                made_from = cls(
                    content["metadata"]["capture"], content["prompt"]["tokens"] + content["response"]["tokens"]
                )
                is_of_prompt = (made_from.prompt_set, made_from.prompt_id) == (prompt_set, prompt_id)
                if made_from.n_layers < 1 or made_from.d_model < 1 or not made_from.kept.layers or not is_of_prompt:
                    return None
            except (StorageError, InputError, KeyError, TypeError, ValueError):
                return None
            found.append(made_from)
        return found[0] if found and all(each._is_of_the_run_of(found[0]) for each in found) else None

    def _is_of_the_run_of(self, other: ProjectedCapture) -> bool:
        return self.tokens == other.tokens and all(self.metadata.get(k) == other.metadata.get(k) for k in _OF_A_RUN)

    def is_like(self, capture: Capture) -> bool:
        """Whether a capture has the same tokens from the same model, computed alike."""
        same = all(self.metadata.get(key) == capture.metadata[key] for key in _ALIKE)
        return same and list(self.tokens) == capture.tokens
