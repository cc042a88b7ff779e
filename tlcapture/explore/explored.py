"""What can be asked of a capture, saved or live: projections, figures, frames, patterns, predictions.

    cap.project("behavioral/refusal").dynamics
    cap.coloured("behavioral/refusal")             # its tokens, coloured by their projection
    cap.plot.trajectory("behavioral/refusal")      # figures: tlcapture/explore/capture_plots.py
    cap.attention(12), cap.logit_lens()
    cap.to_pandas()

Importing this module loads no torch.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.coloured_tokens import ColouredTokens
from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.files import read_json
from tlcapture.storage.layout import Layout
from tlcapture.traits.token_scores import TokenScores
from tlcapture.views.hooks import check_component, hook

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformer_lens import ActivationCache

    from tlcapture.captures.capture import Capture
    from tlcapture.explore.attention_heads import AttentionHeads
    from tlcapture.explore.capture_plots import CapturePlots
    from tlcapture.explore.frames import Layers
    from tlcapture.explore.prediction_table import PredictionTable
    from tlcapture.models.loading import Model
    from tlcapture.traits.projection import Projection


def default_root() -> Path:
    """`TLCAPTURE_ROOT`, or the current folder."""
    return Path(os.environ.get("TLCAPTURE_ROOT") or ".")


class Explored(ABC):
    """A capture with what belongs to it: vectors to project onto, a model to ask, files of its add-ons."""

    @property
    @abstractmethod
    def _captured(self) -> Capture:
        """The capture itself."""

    @abstractmethod
    def _vectors(self) -> Layout | None:
        """The experiment whose vectors are meant where no other is named."""

    @abstractmethod
    def _model(self) -> Model:
        """The model that was captured."""

    def _add_on(self, kind: str) -> Path | None:
        """The file of an add-on (`attention` or `logit_lens`) that was made from this capture, if there is one."""
        return None

    # -- traits -----------------------------------------------------------------------------------

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
        Raises `InputError` for a trait that has no vectors, naming those that have.
        """
        return self._project(
            [trait], layer=layer, method=method, component=component, vector_experiment=vector_experiment
        )[0]

    def projected(self, *traits: str, **how: Any) -> list[TokenScores]:
        """Tokens and projections as figures and frames take them, on all traits with vectors where none is named.

        `how` are the options of `project`.
        """
        return [self._with_tokens(projection) for projection in self._project(traits, **how)]

    def coloured(self, trait: str | None = None, **how: Any) -> ColouredTokens:
        """The tokens, coloured by their projection onto a trait, or by prompt and response."""
        if trait is not None:
            return self.project(trait, **how).coloured()
        return ColouredTokens(self._captured.tokens, len(self._captured.prompt.tokens))

    def to_pandas(self, traits: Iterable[str] | str | None = None, layers: Layers = "own", **how: Any) -> DataFrame:
        """A tidy frame (`tlcapture/explore/frames.py` says what its columns are) of the projections onto traits.

        Args:
            traits: one, several, or all that have vectors.
            layers: `own`, each vector's own layer; `all`; a layer; or several.
            how: the options of `project`.
        """
        from tlcapture.explore.frames import frame

        names = [traits] if isinstance(traits, str) else list(traits or ())
        return frame(self.projected(*names, **how), layers)

    # -- views ------------------------------------------------------------------------------------

    @cached_property
    def plot(self) -> CapturePlots:
        """Figures: `.trajectory(...)`, `.layers(...)`, `.logit_lens()`, `.attention(layer, head)`."""
        from tlcapture.explore.capture_plots import CapturePlots

        return CapturePlots(self)

    @cached_property
    def cache(self) -> ActivationCache:
        """TransformerLens's `ActivationCache` over the stored activations, prompt and response in one line.

        Without a batch axis, in float32. Methods that need the model (`logit_attrs`, anything with
        `apply_ln`) load it when they first ask for it.
        """
        from tlcapture.explore.activation_cache import activation_cache

        return activation_cache(self._captured, self._model)

    def attention(self, layer: SupportsIndex) -> AttentionHeads:
        """The patterns of all heads of a layer: from the experiment's file where it has one of this capture,
        else from one forward pass over the capture's tokens. Raises `InputError` for a layer there is not."""
        number, n_layers = index(layer), self._captured.n_layers
        if not 0 <= number < n_layers:
            raise InputError(f"no layer {number}: the model has layers 0 to {n_layers - 1}")
        if number not in self._heads:
            self._heads[number] = self._saved_heads(number) or self._computed_heads(number)
        return self._heads[number]

    def logit_lens(self) -> PredictionTable:
        """What each layer would predict: from the experiment's file where it has one of this capture, else
        from the stored residuals and the model's unembedding."""
        return self._predictions

    @cached_property
    def _heads(self) -> dict[int, AttentionHeads]:
        return {}

    @cached_property
    def _predictions(self) -> PredictionTable:
        from tlcapture.explore.prediction_table import PredictionTable, table_of_file

        saved = self._read_add_on("logit_lens")
        if saved is not None:
            path, content = saved
            return table_of_file(content, path, self._captured.prompt_set, self._captured.prompt_id)
        from tlcapture.prompts.tokenization import token_texts
        from tlcapture.views.logit_lens import logit_lens_view

        capture, model = self._captured, self._model()
        lens = logit_lens_view(capture.residual, capture.n_layers, capture.token_ids, model.unembed)
        unique = lens.top_ids.unique().tolist()
        texts = dict(zip(unique, token_texts(model.tokenizer, unique), strict=True))
        return PredictionTable(
            prompt_set=capture.prompt_set,
            prompt_id=capture.prompt_id,
            tokens=capture.tokens,
            n_prompt_tokens=len(capture.prompt.tokens),
            top_tokens=[[[texts[i] for i in cell] for cell in row] for row in lens.top_ids.tolist()],
            top_probs=lens.top_probs.double().numpy(),
            actual_rank=lens.actual_rank.numpy(),
            actual_prob=lens.actual_prob.double().numpy(),
            source="its residuals",
        )

    def _saved_heads(self, layer: int) -> AttentionHeads | None:
        from tlcapture.explore.attention_heads import AttentionHeads, heads_of_file

        saved = self._read_add_on("attention")
        if saved is None:
            return None
        path, content = saved
        patterns = heads_of_file(content, path, layer)
        return AttentionHeads(**self._place(), layer=layer, patterns=patterns, source=path.name)

    def _computed_heads(self, layer: int) -> AttentionHeads:
        from tlcapture.explore.attention_heads import AttentionHeads
        from tlcapture.generation.loop import teacher_force

        name = hook("pattern", layer)
        patterns = teacher_force(self._model(), self._captured.token_ids, [name])[name].float().numpy()
        return AttentionHeads(**self._place(), layer=layer, patterns=patterns, source="a forward pass")

    def _place(self) -> dict[str, Any]:
        capture = self._captured
        return {
            "prompt_set": capture.prompt_set,
            "prompt_id": capture.prompt_id,
            "tokens": capture.tokens,
            "n_prompt_tokens": len(capture.prompt.tokens),
        }

    def _read_add_on(self, kind: str) -> tuple[Path, Any] | None:
        """An add-on's file and what it holds; a file of other tokens belongs to another capture."""
        path = self._add_on(kind)
        if path is None:
            return None
        content = read_json(path)
        return (path, content) if isinstance(content, dict) and content.get("tokens") == self._captured.tokens else None

    # -- projections ------------------------------------------------------------------------------

    def _project(
        self,
        traits: Sequence[str],
        *,
        layer: SupportsIndex | str = "auto",
        method: str | None = None,
        component: str = "residual",
        vector_experiment: str | None = None,
    ) -> list[Projection]:
        from tlcapture.traits.choice import VectorChoice, choose_vectors
        from tlcapture.traits.missing_vectors import no_component_vectors
        from tlcapture.traits.projection import project

        capture, source = self._captured, self._source(vector_experiment)
        named = tuple(Trait.parse(name) for name in traits)
        choice = VectorChoice(layer if isinstance(layer, str) else index(layer), method, vector_experiment, named)
        found = choose_vectors(source, choice, capture, check_component(component))
        if found.failures:
            raise found.failures[0][1]
        if not found.vectors:
            raise no_component_vectors(source, component)
        notes = []
        for chosen in found.vectors:
            doubts = [*chosen.notes(capture.metadata), chosen.selection.warning]
            notes += [f"{chosen.vector.trait}: {doubt}" for doubt in doubts if doubt]
        for note in notes:
            warnings.warn(note, stacklevel=3)
        tokens = tuple(capture.tokens)
        pairs = [(chosen.vector, chosen.selection) for chosen in found.vectors]
        projections = project(capture.prompt.residual, capture.response.residual, pairs)
        return [replace(projection, tokens=tokens) for projection in projections]

    def _source(self, vector_experiment: str | None) -> Layout:
        own = self._vectors()
        if vector_experiment is None:
            if own is None:
                raise InputError("this capture is of no experiment: say whose vectors, vector_experiment='NAME'")
            return own
        source = Layout(default_root() if own is None else own.root, vector_experiment)
        source.check_exists()
        return source

    def _with_tokens(self, projection: Projection) -> TokenScores:
        import torch

        capture, dynamics = self._captured, projection.dynamics
        return TokenScores(
            prompt_set=capture.prompt_set,
            prompt_id=capture.prompt_id,
            trait=str(projection.vector.trait),
            component=projection.vector.component,
            method=projection.vector.method,
            layer=projection.vector.layer,
            tokens=projection.tokens,
            n_prompt_tokens=len(projection.prompt),
            scores=torch.cat([projection.prompt, projection.response]).double().numpy(),
            sublayers=projection.sublayers,
            layers=projection.layers,
            commitment_point=dynamics.commitment_point,
            persistence=dynamics.persistence,
        )
