"""The unembeddings of captured models, each loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.comparison.comparing import NoDistributionsError, Unembeddings, check_has_outputs
from tlcapture.models.engines.base import EXTERNAL_PREFIX, Model
from tlcapture.models.unembedding import WantedModel, load_unembedding
from tlcapture.runs.run import Run


class LoadedUnembeddings:
    """Loads the final norms and unembeddings of captured models, each when it is first needed."""

    def __init__(self, run: Run, device: str):
        self._run = run
        self._device = device
        self._models: dict[WantedModel, Model] = {}

    def of(self, a: Capture, b: Capture) -> Unembeddings:
        """The final norm and unembedding of the models of two captures.

        Raises:
            NoDistributionsError: captures lack the last residual or do not say which model they are from, or the
                vocabularies differ.
            ModelError: a model cannot be loaded, or has changed since.
        """
        check_has_outputs(a, b)
        one, other = (self._model(each) for each in [_wanted(each.metadata) for each in (a, b)])
        if one.d_vocab != other.d_vocab:
            raise NoDistributionsError(
                f"the models have vocabularies of {one.d_vocab} and {other.d_vocab} tokens, whose distributions cannot "
                "be compared"
            )
        return Unembeddings(one.unembed, other.unembed, one.d_vocab)

    def _model(self, wanted: WantedModel) -> Model:
        wanted = wanted.of_base if wanted.has_unembedding_of_base else wanted
        if wanted not in self._models:
            self._run.line(
                f"loading the unembedding of {wanted.name}" + (" with its adapter" if wanted.adapter else "")
            )
            self._models[wanted] = load_unembedding(wanted, self._device)
        return self._models[wanted]


def _wanted(metadata: Mapping[str, Any]) -> WantedModel:
    fingerprint, engine, dtype = (metadata.get(name) for name in ("model_fingerprint", "engine", "dtype"))
    name = str(metadata["inference_model"])
    if not (fingerprint and engine and dtype) or str(fingerprint).startswith(EXTERNAL_PREFIX):
        raise NoDistributionsError(f"a capture is from {name!r}, a model that tlcapture did not load")
    own = {name: metadata.get(name) for name in ("adapter", "base_fingerprint", "adapter_digest")}
    return WantedModel(name, str(fingerprint), str(engine), str(dtype), **own)
