"""The base of saved and live captures: projections, figures, frames, attention and logit lens.

    cap.project("behavioral/refusal").dynamics
    cap.coloured("behavioral/refusal")             # its tokens, coloured by projection
    cap.plot.trajectory("behavioral/refusal")      # a Plotly figure
    cap.attention(12), cap.logit_lens()
    cap.to_pandas()

Importing this module loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

from tlcapture.coloured_tokens import ColouredTokens
from tlcapture.errors import InputError
from tlcapture.explore.figures.attention_heads import AttentionHeads
from tlcapture.explore.figures.capture_figures import CaptureFigures
from tlcapture.explore.figures.logit_lens_table import LogitLensTable, table_of_view
from tlcapture.explore.projection_frames import Layers, tidy_frame
from tlcapture.explore.roots import default_root
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import as_ranges
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.vector_sources.packaged import vectors_layout
from tlcapture.views.hooks import hook
from tlcapture.views.kept_points import from_the_end

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pandas import DataFrame
    from torch import Tensor
    from transformer_lens import ActivationCache

    from tlcapture.captures.capture import Capture
    from tlcapture.explore.applied_interventions import AppliedInterventions
    from tlcapture.models.loading import Model
    from tlcapture.traits.projections.projection import Projection
    from tlcapture.views.cache import Cache
    from tlcapture.views.head_summary import ReadByRow
    from tlcapture.views.logit_lens import LogitLens


class ExplorableCapture(ABC):
    """Base of `SavedCapture` and `LiveCapture`: a capture with trait vectors, a model and files of its views."""

    @property
    @abstractmethod
    def _captured(self) -> Capture:
        """The capture itself."""

    @abstractmethod
    def _vectors(self) -> Layout | None:
        """The experiment whose vectors are used by default, if any."""

    @abstractmethod
    def _model(self) -> Model:
        """The model that was captured."""

    @abstractmethod
    def _applied(self) -> AppliedInterventions:
        """The interventions and hooks under which the capture was made.

        Raises `InputError` if they cannot be applied again.
        """

    @abstractmethod
    def _stored_internals(self, layer: int) -> dict[str, Tensor] | None:
        """The activations of a layer that were captured, if they were."""

    @abstractmethod
    def _stored_heads(self, layer: int) -> AttentionHeads | None:
        """The attention patterns of a layer that were captured, if they were."""

    @abstractmethod
    def _stored_attention(self) -> ReadByRow | None:
        """The attention patterns of all layers that were captured, read token by token."""

    @abstractmethod
    def _stored_lens(self) -> LogitLensTable | None:
        """The logit lens that was captured, if it was."""

    # -- traits -----------------------------------------------------------------------------------

    def project(
        self,
        trait: str | Tensor | NDArray[Any] | Sequence[Any],
        *,
        layer: SupportsIndex | str | Sequence[SupportsIndex] = "auto",
        method: str | None = None,
        component: str = "residual",
        vector_experiment: str | None = None,
    ) -> Any:
        """The projection onto a trait's vector, which is selected as in `tlcapture project`.

            cap.project("behavioral/refusal").trajectory
            cap.project(["behavioral/refusal", "style/formality"], layer=[8, -1])
            cap.project(direction, layer=12)

        Args:
            trait: `category/name`, or your own direction `[d_model]`, a tensor or an array, which is scaled to length
                1; or several of them.
            layer: the vector's layer, negative ones counting from the last, or several; `auto` selects it. Your own
                direction needs one.
            method: `probe`, `mean_diff`, `gradient` or `imported`; the selected one by default.
            component: `residual` or `attn_out`.
            vector_experiment: the experiment whose vectors are used, even if they were extracted from another model.

        Returns a `Projection`, or a list of them where several traits or layers are given: by layer, then by trait,
        your own directions last.

        Warns if the vector is of another model or of unknown origin, or if its layer is a default.

        Raises:
            InputError: the trait has no vectors; the message names the traits that have.
            VectorError: the vector does not fit the capture.
        """
        layers, traits = _several(layer), _traits(trait)
        how: dict[str, Any] = {"method": method, "component": component, "vector_experiment": vector_experiment}
        found = [each for at in layers for each in self._project(traits, layer=at, **how)]
        return found[0] if layers == [layer] and any(each is trait for each in traits) else found

    def projected(self, *traits: str | Tensor | NDArray[Any], **how: Any) -> list[TokenScores]:
        """Projections with their tokens, as figures and frames need them; onto all traits with vectors by default.

            for scores in cap.projected("behavioral/refusal", "style/formality"):
                print(scores.title, scores.calibrated)

        Your own directions `[d_model]` need a `layer`, and come last at each. `how` are the options of `project`.
        """
        layers = _several(how.pop("layer", "auto"))
        found = [each for layer in layers for each in self._project(traits, layer=layer, **how)]
        from tlcapture.explore.projecting import with_tokens

        return [with_tokens(self._captured, projection) for projection in found]

    def by_span(self, trait: str | Tensor | NDArray[Any], **how: Any) -> list[dict[str, Any]]:
        """The mean and the dynamics of the projection onto a trait within each turn, the thinking and the answer.

            [(each["kind"], each["mean"]) for each in cap.by_span("behavioral/refusal")]

        The entries are those of `dynamics.by_span` in projection files. `how` are the options of `project`.
        """
        from tlcapture.traits.statistics.span_dynamics import by_span

        movement = self._project([trait], **how)[0].movement.numpy()
        return by_span(movement[None], self._captured.spans)[0]

    def coloured(self, trait: str | Tensor | NDArray[Any] | None = None, **how: Any) -> ColouredTokens:
        """The tokens, coloured by their projection onto a trait, or by turn, thinking and answer if none is given.

            cap.coloured("behavioral/refusal")
            cap.coloured()

        `how` are the options of `project`.
        """
        if trait is not None:
            return self.project(trait, **how).coloured()
        return self._captured.coloured_by_part()

    def to_pandas(self, traits: Iterable[Any] | str | None = None, layers: Layers = "own", **how: Any) -> DataFrame:
        """Projections as a tidy data frame.

            cap.to_pandas("behavioral/refusal").nlargest(5, "score")
            cap.to_pandas("behavioral/refusal", layer=[8, 12])
            cap.to_pandas(direction, layer=12)

        Columns are `prompt_id`, `token_idx`, `token`, `part`, `span`, `role`, `trait`, `layer`, `score` and
        `calibrated`.

        Args:
            traits: one or several, or your own directions `[d_model]`; all that have vectors by default.
            layers: the layers whose activations are projected: `own` (each vector's own layer), `all`, one, or several.
            how: the options of `project`. `layer=[8, 16]` takes the vectors of these layers, and so compares them.
        """

        return tidy_frame(self.projected(*([] if traits is None else _traits(traits)), **how), layers)

    # -- views ------------------------------------------------------------------------------------

    @cached_property
    def plot(self) -> CaptureFigures:
        """Figures: `.trajectory(...)`, `.layers(...)`, `.logit_lens()`, `.attention(layer, head)` and more.

        Example:
            cap.plot.trajectory("behavioral/refusal").save("refusal.png")
        """

        return CaptureFigures(self)

    @cached_property
    def cache(self) -> ActivationCache:
        """TransformerLens's `ActivationCache` over the stored activations, prompt and response as one sequence.

            cap.cache["resid_post", 12]
            cap.cache.accumulated_resid()

        Tensors are float32 and have no batch axis. Attention patterns and internals are there where the experiment has
        their files: `cache["pattern", 5]`. Methods that need the model (`logit_attrs`, anything with `apply_ln`) load
        it on first use.
        """
        from tlcapture.explore.activation_cache import activation_cache
        from tlcapture.explore.internals import stored_hooks

        stored = stored_hooks(self._captured.n_layers, self._stored_internals, self._stored_heads)
        return activation_cache(self._captured, self._model, stored)

    def internals(self, layer: SupportsIndex) -> dict[str, Tensor]:
        """Everything a layer computed, by TransformerLens's names, such as `blocks.12.mlp.hook_post`.

            cap.internals(12)["blocks.12.mlp.hook_post"]

        It is read from the experiment's internals file of this capture, in the dtype that it was stored in, or computed
        by a forward pass over its tokens. Raises `InputError` if the layer does not exist.
        """
        from tlcapture.views.internals import internals_hooks, internals_view

        at = self._layer(layer)
        stored = self._stored_internals(at)
        if stored is not None:
            return stored
        cache = self._forced(internals_hooks(at, self._model().hook_names))
        return internals_view(cache, at, self._captured.positions)

    def attention(self, layer: SupportsIndex) -> AttentionHeads:
        """The attention patterns of all heads of a layer.

            cap.attention(12).pattern(0)  # [query, key]

        They are read from the experiment's attention file of this capture, or computed by a forward pass over its
        tokens. Raises `InputError` if the layer does not exist or has no attention.
        """
        layer_index = self._layer(layer)
        if layer_index not in self._heads:
            self._heads[layer_index] = self._stored_heads(layer_index) or self._computed_heads(layer_index)
        return self._heads[layer_index]

    def head_summary(self) -> DataFrame:
        """What each head attends to on average over the response, a row for each layer and head.

            cap.head_summary().nlargest(5, "previous")  # previous-token heads

        Columns are `prompt_id`, `sample`, `part`, `n_queries`, `layer`, `head`, `entropy` in nats, `distance` looked
        back in tokens, and the weights on the `first` token, the `previous` one and it`self`: means over the
        `n_queries` tokens of the response, or of the prompt if there is no response.

        Raises `InputError` without attention that was stored, or captured with `attention=True`.
        """
        from tlcapture.explore.figures.head_figures import heads_frame

        return heads_frame(self)

    def logit_lens(self) -> LogitLensTable:
        """The next-token predictions of every layer.

            cap.logit_lens().top_tokens[12][-1][:3]  # of layer 12, after the last token but one

        They are read from the experiment's logit-lens file of this capture, or computed from the stored residuals
        with the model's unembedding.
        """
        return self._logit_lens

    @cached_property
    def _heads(self) -> dict[int, AttentionHeads]:
        return {}

    @cached_property
    def _logit_lens(self) -> LogitLensTable:
        stored = self._stored_lens()
        if stored is not None:
            return stored
        from tlcapture.views.logit_lens import logit_lens_view

        capture, model = self._captured, self._model()
        lens = logit_lens_view(
            capture.residual,
            capture.n_layers,
            capture.token_ids,
            model.unembed,
            positions=capture.positions,
            device=model.last_device,
        )
        return self._lens_table(lens)

    def _lens_table(self, lens: LogitLens) -> LogitLensTable:

        return table_of_view(lens, self._model().tokenizer, self._captured.positions.stated, self._labels())

    def _layer(self, layer: SupportsIndex) -> int:
        """A layer of the model, negative ones counted from the last; raises `InputError` for any other."""
        n_layers = self._captured.n_layers
        if not isinstance(layer, SupportsIndex):
            raise InputError(f"layer {layer!r} is not a number: the model has layers 0 to {n_layers - 1}")
        found = index(from_the_end(layer, n_layers))
        if not 0 <= found < n_layers:
            raise InputError(f"no layer {found}: the model has layers 0 to {n_layers - 1}")
        return found

    def _computed_heads(self, layer: int) -> AttentionHeads:
        name = hook("pattern", layer)
        if name not in self._model().hook_names:
            raise InputError(f"layer {layer} has no attention: layers {as_ranges(self._model().attention_layers)} have")
        return self._heads_in(self._forced([name]), layer, "a forward pass")

    def _heads_in(self, cache: Cache, layer: int, source: str) -> AttentionHeads:
        """The heads of a layer in a cache; as in files, without the rows of tokens that the capture does not hold."""

        patterns, held = cache[hook("pattern", layer)].float().numpy(), self._captured.positions
        if not held.is_all:
            patterns = patterns.copy()
            patterns[:, [token for token in range(held.n_tokens) if token not in held.kept]] = float("nan")
        return AttentionHeads(**self._labels(), layer=layer, patterns=patterns, source=source)

    def _forced(self, names: Sequence[str]) -> Cache:
        """Activations of a pass over the tokens, under the interventions that the capture was made with."""
        return self._applied().forced(self._model(), self._captured, names)

    def _labels(self) -> dict[str, Any]:
        """Fields that `AttentionHeads` and `LogitLensTable` have in common."""
        capture = self._captured
        return {
            "prompt_set": capture.capture_set,
            "prompt_id": capture.prompt_id,
            "sample": capture.sample,
            "tokens": capture.tokens,
            "n_prompt_tokens": len(capture.prompt.tokens),
        }

    # -- projections ------------------------------------------------------------------------------

    def _project(
        self,
        traits: Sequence[Any],
        *,
        layer: SupportsIndex | str = "auto",
        method: str | None = None,
        component: str = "residual",
        vector_experiment: str | None = None,
        **unknown: Any,
    ) -> list[Projection]:
        """Projections onto traits, all of them if none is given, and after them onto the user's own directions."""
        from tlcapture.explore.projecting import project_own, project_traits

        for name in unknown:
            raise InputError(f"no option {name!r}: expected layer, method, component or vector_experiment")
        named = [each for each in traits if isinstance(each, str)]
        own = [each for each in traits if not isinstance(each, str)]
        how: dict[str, Any] = {"method": method, "component": component, "vector_experiment": vector_experiment}
        found: list[Projection] = []
        if named or not own:
            found = project_traits(self._captured, self._source(vector_experiment), named, layer=layer, **how)
        return found + [project_own(self._captured, self._vectors(), each, layer, component) for each in own]

    def _source(self, vector_experiment: str | None) -> Layout:
        own = self._vectors()
        if vector_experiment is None:
            if own is None:
                raise InputError(
                    "this capture belongs to no experiment: pass vector_experiment='NAME' to choose vectors, or "
                    "'packaged' for those that come with the package"
                )
            return own
        source = vectors_layout(default_root() if own is None else own.root, vector_experiment)
        source.check_exists()
        return source


def _several(layer: Any) -> list[Any]:
    return [layer] if isinstance(layer, str) or not isinstance(layer, Sequence) else list(layer)


def _traits(given: Any) -> list[Any]:
    """Traits and directions `[d_model]`, given as one or as several; the rows of a matrix are directions."""
    is_direction = getattr(given, "ndim", 2) < 2 and getattr(given.dtype, "kind", "f") not in "OUST"
    return [given] if isinstance(given, str) or is_direction or not isinstance(given, Iterable) else list(given)
