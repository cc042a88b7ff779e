"""An experiment as an object: its captures, opened when they are touched.

exp = Experiment("my_exp")
cap = exp.captures("single_trait")["3"]        # or [3]: prompt ids that are numbers, as numbers
cap.residual(16, "residual_out")               # [n_tokens, d_model]
cap.project("behavioral/refusal").trajectory   # [n_tokens]
cap.cache["resid_post", 16]                    # TransformerLens's ActivationCache
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.config import ExperimentConfig, read_config
from tlcapture.errors import InputError
from tlcapture.layout import Layout
from tlcapture.names import Trait

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from tlcapture.captures import Capture
    from tlcapture.models import Model
    from tlcapture.traits.projection import Projection


class Experiment:
    """One experiment's folder. Raises `InputError` where there is none."""

    def __init__(self, name: str, root: str | Path | None = None):
        self.layout = Layout(Path(root or os.environ.get("TLCAPTURE_ROOT") or "."), name)
        if not self.layout.folder.is_dir():
            there = sorted(path.name for path in self.layout.folder.parent.glob("*") if path.is_dir())
            listed = ", ".join(there) or "none"
            raise InputError(f"no experiment {name!r}: expected the folder {self.layout.folder}; there are: {listed}")

    def __repr__(self) -> str:
        counts = [f"{name}: {len(self.captures(name))}" for name in self.prompt_sets]
        return f"Experiment({self.layout.experiment!r}, captures {{{', '.join(counts)}}}, {len(self.traits)} traits)"

    @property
    def config(self) -> ExperimentConfig:
        return read_config(self.layout)

    @property
    def prompt_sets(self) -> list[str]:
        """Prompt sets with captures."""
        return self.layout.captured_prompt_sets()

    @property
    def traits(self) -> list[str]:
        """Traits with vectors."""
        return [str(trait) for trait in self.layout.traits()]

    def captures(self, prompt_set: str) -> Captures:
        """The captures of a prompt set, by prompt id."""
        return Captures(self, prompt_set)

    @cached_property
    def model(self) -> Model:
        """The experiment's inference model, loaded when first touched."""
        from tlcapture.models import load_model

        name = self.config.inference_model
        if name is None:
            raise InputError(f"experiment {self.layout.experiment!r} has captured nothing yet: it names no model")
        return load_model(name)


class Captures(Mapping[str, "SavedCapture"]):
    """Captures of one prompt set, in the order of their ids; none is opened before it is touched."""

    def __init__(self, experiment: Experiment, prompt_set: str):
        self._experiment = experiment
        self.prompt_set = prompt_set
        self._ids = experiment.layout.captured(prompt_set)

    def __getitem__(self, prompt_id: str | int) -> SavedCapture:
        if str(prompt_id) not in self._ids:
            raise KeyError(
                f"{prompt_id!r}: prompt set {self.prompt_set!r} has captures {', '.join(self._ids) or 'none'}"
            )
        return SavedCapture(self._experiment, self.prompt_set, str(prompt_id))

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"Captures({self.prompt_set!r}: {', '.join(self._ids)})"


class SavedCapture:
    """A capture of an experiment, opened (memory-mapped) when something of it is touched.

    Everything of `Capture` is here as well: `tokens`, `prompt`, `response`, `residual(layer, point)`.
    """

    def __init__(self, experiment: Experiment, prompt_set: str, prompt_id: str):
        self.experiment = experiment
        self.prompt_set = prompt_set
        self.prompt_id = prompt_id

    @cached_property
    def capture(self) -> Capture:
        from tlcapture.captures import Capture

        return Capture.open(self.experiment.layout.residual(self.prompt_set, self.prompt_id))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.capture, name)

    def __repr__(self) -> str:
        tokens = f"{len(self.capture.prompt.tokens)} + {len(self.capture.response.tokens)} tokens"
        return f"SavedCapture({self.prompt_set}/{self.prompt_id}, {tokens}, {self.capture.response.text[:60]!r})"

    def project(
        self,
        trait: str,
        *,
        layer: SupportsIndex | str = "auto",
        method: str | None = None,
        component: str = "residual",
        vector_experiment: str | None = None,
    ) -> Projection:
        """The projection onto a trait, its vector chosen as `tlcapture project` does.

        Warns where the vector is of another model or of unknown origin, and where its layer is a default.
        """
        from tlcapture.runs.vectors import origin_warnings
        from tlcapture.traits.projection import project
        from tlcapture.traits.selection import select
        from tlcapture.traits.vectors import VectorFolder

        layout = self.experiment.layout
        source = Layout(layout.root, vector_experiment) if vector_experiment else layout
        folder = VectorFolder(source, Trait.parse(trait))
        selection = select(folder, component, self.capture.n_layers, layer=layer, method=method)
        vector = folder.read(component, selection.method, selection.layer)
        notes = origin_warnings(vector, self.capture.metadata, intended=vector_experiment is not None)
        for note in [*notes, *([f"{trait}: {selection.warning}"] if selection.warning else [])]:
            warnings.warn(note, stacklevel=2)
        return project(self.capture.prompt.residual, self.capture.response.residual, [(vector, selection)])[0]

    @cached_property
    def cache(self) -> ActivationCache:
        """TransformerLens's `ActivationCache` over the stored activations, prompt and response in one line.

        Without a batch axis, in float32. Methods that need the model (`logit_attrs`, anything with
        `apply_ln`) load it when they first ask for it.
        """
        from tlcapture.activation_cache import activation_cache

        return activation_cache(self.capture, self._model)

    def _model(self) -> Model:
        """The experiment's model, if it is the one that was captured."""
        model, mark = self.experiment.model, self.capture.metadata.get("model_fingerprint")
        if model.fingerprint != mark:
            raise InputError(
                f"{self.prompt_set}/{self.prompt_id} was captured from {self.capture.metadata['inference_model']!r} "
                f"(fingerprint {mark}), but the experiment's model is now {model.name!r} ({model.fingerprint})"
            )
        return model
